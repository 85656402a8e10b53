"""pytest with the given arguments, then one line that says what was verified here."""

import sys

import pytest


class Tally:
    """Counts the tests that passed, and those of them that ran on a CUDA device."""

    passed = 0
    passed_cuda = 0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and report.passed:
            self.passed += 1
            self.passed_cuda += "cuda" in report.keywords


def verdict(status: int, tally: Tally) -> str:
    if status != 0 or tally.passed == 0:
        return f"FAIL: pytest ended with status {status}, {tally.passed} tests passed."
    import torch

    import lt2_ext
    from lt2_ext.recipes.doctor import describe_archs

    info = lt2_ext.build_info()
    if not info["cuda_archs"]:
        cuda = "CUDA not compiled."
    elif tally.passed_cuda:
        cuda = f"CUDA compiled for {describe_archs(info['cuda_archs'])}, verified on {torch.cuda.get_device_name()}."
    else:
        why = "no CUDA test passed" if torch.cuda.is_available() else "no GPU"
        cuda = f"CUDA compiled for {describe_archs(info['cuda_archs'])}, not run ({why})."
    return f"PASS: CPU verified ({info['cpu_isa']}). {cuda}"


if __name__ == "__main__":
    tally = Tally()
    status = int(pytest.main(sys.argv[1:], plugins=[tally]))
    line = verdict(status, tally)
    print(line)
    sys.exit(0 if line.startswith("PASS") else status or 1)
