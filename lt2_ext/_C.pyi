cpu_isas: str
cuda_archs: str

def cpu_isa() -> str: ...
