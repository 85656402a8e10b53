"""LT2: a transformer with linear-time token mixers whose stack of layers runs several times (arXiv 2605.20670).

With embedding Emb, N blocks F_1 .. F_N, loops tau = 1 .. T and a per-channel gate rho_tau that starts at zero::

    h^0   = Emb(x)
    h^tau = (F_N o .. o F_1)(h^(tau-1)) + rho_tau * h^(tau-1)
    y     = Head(RMSNorm(h^T))

With ``inter_loop_norm`` each h^tau passes through that RMSNorm before the next loop reads it, as in Ouro.

Looping buys depth without parameters: T N layers of computation from N layers of weights. Only the hidden state h
passes from loop to loop; every loop scans the sequence anew, so each (loop, layer) has its own memory when decoding
(:class:`LoopState`). Handing the state at the end of loop tau to loop tau + 1 would let a token see its future.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lt2_ext import ops

from .config import LT2Config
from .engine import Engine
from .inputs import check_inputs
from .loop_state import LoopState, Slots, Tokens
from .loss import cross_entropy
from .mixers import MIXERS, Mixer, Shared, State
from .sampling import check_options
from .segments import run_segments
from .step import step, step_weights


class LT2Output(NamedTuple):
    """loss: mean next-token cross entropy plus ``index_loss_weight`` times index_loss, fp32 scalar; logits: those that
    ``logits_to_keep`` asks for, or None; index_loss: mean over the ``dsa`` layers in grad mode, else None."""

    loss: Tensor
    logits: Tensor | None
    index_loss: Tensor | None


class RMSNorm(nn.RMSNorm):
    """In the dtype of its weight, which under autocast is not that of a block's output."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.to(self.weight.dtype), self.normalized_shape, self.weight, self.eps)


class SwiGLU(nn.Module):
    def __init__(self, config: LT2Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(ops.swiglu(self.gate_proj(x), self.up_proj(x)))


class Block(nn.Module):
    """One physical layer: a mixer across tokens, then a SwiGLU within each token, each normalised and residual.

    ``norm_placement="pre"`` is ``h + f(norm(h))``; ``"sandwich"`` is ``h + post_norm(f(norm(h)))``, as in Ouro.
    """

    def __init__(self, config: LT2Config, mixer: str) -> None:
        super().__init__()

        def norm() -> RMSNorm:
            return RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

        def post_norm() -> nn.Module:
            return norm() if config.norm_placement == "sandwich" else nn.Identity()

        self.eps, self.sandwich = config.rms_norm_eps, config.norm_placement == "sandwich"
        self.hidden_size = config.hidden_size
        self.mixer_norm, self.mixer, self.mixer_post_norm = norm(), MIXERS[mixer](config), post_norm()
        self.mlp_norm, self.mlp, self.mlp_post_norm = norm(), SwiGLU(config), post_norm()

    def forward(
        self, h: Tensor, tokens: Tokens, window: int | None, state: State | None, shared: Shared | None = None
    ) -> tuple[Tensor, Shared | None]:
        if tokens.step and state is not None:
            key = id(self), window, shared is None
            weights = tokens.once(key, lambda: step_weights(self, h, tokens, state, shared))
            if weights is not None:
                return step(self, weights, h, tokens, window, state, shared)
        y, shared = self.mixer(tokens.clear_pads(self.mixer_norm(h)), tokens, window, state, shared)
        h, normed = ops.add_rmsnorm(self.mixer_post_norm(y), h, self.mlp_norm.weight, self.eps)
        return h + self.mlp_post_norm(self.mlp(normed)), shared


class LT2(nn.Module):
    """The model.

    Attributes:
        gradient_checkpointing: Keep only the input of each (loop, block) for the backward pass, which runs the block a
            second time: the same gradients, bit for bit, from less memory. Off at first, and not saved.
        dense_warmup: ``dsa`` layers attend to all keys, and their indexers learn from that: the first stage of training
            them. Off at first, and not saved.
    """

    gradient_checkpointing = False
    dense_warmup = False

    def __init__(self, config: LT2Config) -> None:
        super().__init__()
        self.config, self.schedule = config, config.schedule()
        meta = torch.get_default_device().type == "meta"  # there torch takes seconds to initialise nothing
        weight = torch.empty(config.vocab_size, config.hidden_size) if meta else None
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, _weight=weight)
        self.layers = nn.ModuleList(Block(config, layer.mixer) for layer in self.schedule[0])
        shape = (config.loop_count, config.hidden_size)
        self.rho = nn.Parameter(torch.empty(shape)) if config.use_loop_residual else None
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        tied = config.tie_word_embeddings
        self.lm_head = None if tied else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if not meta:
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """The paper's initialisation: normal, std = hidden_size^-1/2, cut at 3 std; no scaling with depth or loops."""

        def truncated_normal(weight: Tensor, width: int) -> None:
            std = width**-0.5
            nn.init.trunc_normal_(weight, std=std, a=-3 * std, b=3 * std)

        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                truncated_normal(module.weight, self.config.hidden_size)
            elif isinstance(module, RMSNorm):
                nn.init.ones_(module.weight)
        if self.rho is not None:
            nn.init.zeros_(self.rho)
        for module in self.modules():
            if isinstance(module, SwiGLU):
                truncated_normal(module.down_proj.weight, self.config.intermediate_size)
            elif isinstance(module, Mixer):
                module.reset_parameters()

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        attention_mask: Tensor | None = None,
        state: LoopState | None = None,
        logits_to_keep: int | None = None,
        slots: Slots = None,
        generated: bool = False,
    ) -> Tensor | LT2Output:
        """Next-token logits, or the loss.

        Args:
            input_ids: Integers ``[B, T]``, T >= 1.
            labels: ``[B, T]``, usually input_ids itself: the model shifts them. -100 is ignored, and so is the first
                token of each packed document. With labels the result is ``(loss, logits)``, and logits are None unless
                ``logits_to_keep`` asks for them: without them, memory does not grow with the vocabulary.
            cu_seqlens: int32 or int64 ``[N + 1]``: the only row holds N documents, document n is
                ``[cu_seqlens[n], cu_seqlens[n + 1])``. Nothing passes between documents.
            attention_mask: Bool or integers ``[B, T]``, 0 for padding on the left or right of a row; its logits mean
                nothing, its labels are ignored, and the other logits are those of the row without it. With a state it
                may only come before the first token of a sequence. Not together with cu_seqlens.
            state: From :meth:`new_state`. The tokens continue the sequences in it, and it is advanced in place.
                Inference only: no gradient is recorded. Not together with labels or cu_seqlens.
            logits_to_keep: Return the logits of the last so many positions; 0: of all. None: of all, or with labels of
                none.
            slots: With a state, the slot of each row: different ints, or a tensor int64 ``[B]`` of them. The host reads
                no tensor: whoever passes one sees to the room in ``host_lengths``, and with ``gdn:segment`` calls
                ``state.hand_over`` where a segment starts. None: row b has slot b.
            generated: The one token of each row was chosen by the model, and is no part of a prompt: ``kv:last`` and
                ``kv:mean`` hand on its keys and values. Without effect in every other mode. Needs a state.

        Returns:
            Logits ``[B, T, vocab_size]``, or :class:`LT2Output` when labels are given.

        Raises:
            ValueError: Input outside these rules, or more tokens than the state has room for; the state is unchanged.
        """
        inputs = input_ids, labels, cu_seqlens, attention_mask, state, logits_to_keep, slots, generated
        check_inputs(self.config, *inputs)
        with torch.set_grad_enabled(torch.is_grad_enabled() and state is None):
            tokens = Tokens(self.config, input_ids.shape, input_ids.device, cu_seqlens, attention_mask, state, slots)
            tokens.dense = self.dense_warmup
            tokens.trained = labels is not None and torch.is_grad_enabled() and self.config.index_loss_weight > 0
            h, index_loss = tokens.clear_pads(self.embed_tokens(input_ids)), None
            if self.config.reuse.segment:
                h = run_segments(self, h, tokens, state, slots)
            else:
                h, index_loss = self.run_loops(h, tokens, None if state is None else state.layers)
                if state is not None:
                    state.advance(input_ids.shape[1], tokens.padding, slots)
            if generated and state is not None:
                state.merge_keys(tokens)
            weight = self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight
            if labels is None:
                return F.linear(h[:, -(logits_to_keep or 0) :], weight)
        hidden = tokens.positions <= 0 if tokens.pads is None else (tokens.positions <= 0) | tokens.pads
        labels = labels.masked_fill(hidden, -100)[:, 1:]
        loss = cross_entropy(h[:, :-1].flatten(0, 1), weight, labels.flatten())
        if index_loss is not None:
            loss = loss + self.config.index_loss_weight * index_loss
        return LT2Output(loss, None if logits_to_keep is None else F.linear(h[:, -logits_to_keep:], weight), index_loss)

    def run_loops(self, h: Tensor, tokens: Tokens, states: list[list[State]] | None) -> tuple[Tensor, Tensor | None]:
        """Embeddings ``[B, T, hidden_size]`` -> normalised output of the last loop, and mean loss of the indexers.
        states: ``[loop][layer]``, of a :class:`LoopState`, or of a segment, which replaces them."""
        checkpointed = self.gradient_checkpointing and torch.is_grad_enabled()
        shared: list[Shared | None] = [None] * len(self.layers)
        losses: list[Tensor] = []
        if tokens.step:
            mixers = (block.mixer for block in self.layers)
            tokens.cast([p for m in mixers if isinstance(m, Mixer) for p in m.step_floats()])
        rho = (None,) * len(self.schedule) if self.rho is None else tokens.as_float(self.rho).unbind()
        for loop, layers in enumerate(self.schedule):
            h_in = h
            for i, (block, layer) in enumerate(zip(self.layers, layers, strict=True)):
                arguments = h, tokens, layer.window, None if states is None else states[loop][i], shared[i]
                if checkpointed:
                    h, result = checkpoint(block, *arguments, use_reentrant=False, preserve_rng_state=False)
                else:
                    h, result = block(*arguments)
                if result is not None and result.loss is not None:
                    losses.append(result.loss)
                if self.config.state_reuse != "none":
                    shared[i] = result
                if states is not None and result is not None and result.state is not None:
                    states[loop][i] = result.state
            h, normed = self._end_loop(loop, h, h_in, rho[loop])
            if self.config.inter_loop_norm:
                h = normed
        return normed, torch.stack(losses).mean() if losses else None

    def _end_loop(self, loop: int, h: Tensor, h_in: Tensor, rho: Tensor | None) -> tuple[Tensor, Tensor]:
        """The loop's output, and its RMSNorm where that is used: after the last loop, or after each."""
        wanted = self.config.inter_loop_norm or loop == self.config.loop_count - 1
        if rho is None:
            return h, self.norm(h) if wanted else h
        if not wanted:
            return ops.loop_residual(h, h_in, rho), h
        return ops.loop_residual_rmsnorm(h, h_in, rho, self.norm.weight, self.config.rms_norm_eps)

    def new_state(self, batch_size: int, max_length: int) -> LoopState:
        """Empty memory for ``batch_size`` sequences of up to ``max_length`` tokens, dtype and device of the weights."""
        mixers = [module for module in self.modules() if isinstance(module, Mixer)]
        return LoopState(self.config, mixers, batch_size, max_length)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        eos_token_id: int | None = None,
        generator: torch.Generator | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Continue ``input_ids`` ``[B, T]``: with an :class:`Engine`, all rows at a time.

        Args:
            max_new_tokens: Tokens to add, at most.
            temperature: 0 takes the likeliest token; otherwise logits are divided by it and a token is drawn.
            top_k: Draw from the k likeliest tokens only.
            top_p: Draw from the likeliest tokens that together reach probability top_p.
            eos_token_id: A row that has produced it is filled up with it; generation ends when every row has.
            generator: Source of randomness, for reproducible draws.
            attention_mask: ``[B, T]``, 0 for padding on the left.

        Returns:
            ``[B, T + new]``: the input and what was added.
        """
        check_options(max_new_tokens, temperature, top_k, top_p)
        if max_new_tokens == 0:
            return input_ids
        check_inputs(self.config, input_ids, None, None, attention_mask, None, None)
        rows, length = input_ids.shape
        engine = Engine(self, rows, length + max_new_tokens, chunk=rows * length)
        device = None if generator is None else generator.device
        seeds = torch.randint(2**62, (rows,), generator=generator, device=device).tolist()
        options = (max_new_tokens, temperature, top_k, top_p, eos_token_id)
        results = []
        for i, seed in enumerate(seeds):
            prompt = input_ids[i] if attention_mask is None else input_ids[i][attention_mask[i] != 0]
            results.append(engine.add(prompt, *options, seed))
        while engine.running:
            engine.step()
        longest = max(len(result.tokens) for result in results)
        end = -1 if eos_token_id is None else eos_token_id  # without it all are as long
        new = [result.tokens + [end] * (longest - len(result.tokens)) for result in results]
        return torch.cat((input_ids, input_ids.new_tensor(new)), dim=1)

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write ``config.json`` and ``model.safetensors`` (no pickle); each replaces the old file in one step."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        weights = {name: t.detach().contiguous() for name, t in self.state_dict().items()}
        dtype = str(self.embed_tokens.weight.dtype).removeprefix("torch.")  # for transformers; load asks the weights
        config = json.dumps({**self.config.to_dict(), "dtype": dtype}, indent=2) + "\n"
        save_file(weights, directory / "model.safetensors.tmp", metadata={"format": "pt"})
        (directory / "config.json.tmp").write_text(config)
        for name in ("model.safetensors", "config.json"):
            os.replace(directory / f"{name}.tmp", directory / name)

    @classmethod
    def load(cls, directory: str | os.PathLike[str], device: str | torch.device = "cpu") -> LT2:
        """The model that :meth:`save` wrote, in the dtype it had; it reads safetensors and nothing else.

        Names and shapes in the file are compared with the config before any weight is read.

        Raises:
            FileNotFoundError: ``config.json`` or ``model.safetensors`` is missing (a pickle is never read instead).
            ValueError: A broken file, an unknown config key, or weights that do not fit the config.
        """
        path = Path(directory) / "model.safetensors"
        if not path.is_file():
            raise FileNotFoundError(f"LT2.load: no {path}; weights are read from safetensors only")
        config = LT2Config.from_dict(json.loads((Path(directory) / "config.json").read_text()))
        with torch.device("meta"):
            model = cls(config)
        expected = {name: list(t.shape) for name, t in model.state_dict().items()}
        try:
            with safe_open(path, framework="pt") as file:
                found = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
                for name in sorted(expected.keys() | found.keys()):
                    want, got = expected.get(name, "nothing"), found.get(name, "nothing")
                    if want != got:
                        raise ValueError(f"LT2.load: {path}: {name} must have shape {want}, got {got}")
                weights = {name: file.get_tensor(name) for name in found}
        except SafetensorError as e:
            raise ValueError(f"LT2.load: {path} is not a valid safetensors file ({e})") from e
        for name, t in weights.items():
            if not t.is_floating_point():
                raise ValueError(f"LT2.load: {path}: {name} must be floating point, got {t.dtype}")
        model.load_state_dict(weights, assign=True)
        return model.to(device)
