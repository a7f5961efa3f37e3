"""Kronecker factors of the curvature of a network's features, for a penalty that needs no other task's data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_merge.errors import ConfigurationError
from lit_merge.evaluation.statistics.examples import examples
from lit_merge.evaluation.statistics.fisher import requiring_gradients
from lit_merge.evaluation.statistics.gram import LayerInputs, identity_of
from lit_merge.functional.evaluation import evaluating
from lit_merge.params import Params, check_finite, working_dtype
from lit_merge.vectors.statistics import (
    EIGENVALUES,
    INPUT_BASIS,
    INPUT_FACTOR,
    OUTPUT_BASIS,
    OUTPUT_FACTOR,
    WHOLE_FACTOR,
    bias_of,
    row_blocks,
)

__all__ = ["collect_kfac"]

_CHUNK = 16  # examples whose activations and gradients are held at once


def collect_kfac(
    module: nn.Module,
    loader: Iterable[Any],
    seed: int = 0,
    normalised: bool = True,
    convolutions: bool = False,
    inputs: Callable[[Any], tuple[Any, ...]] | None = None,
    corrected: bool = False,
) -> Params:
    r"""Kronecker factors A and G of the Gauss-Newton matrix of the features (TAK, ICLR 2026; Martens and Grosse 2015).

    .. math::
        A_l = \frac{1}{N} \sum_n \frac{1}{L} \sum_t a_{nt} a_{nt}^\top, \qquad
        G_l = \frac{1}{N} \sum_n \frac{1}{L} \sum_t g_{nt} g_{nt}^\top

    a are a linear layer's inputs at the L tokens of example n, with a 1 for its bias, and g the gradients of
    ``⟨f(x_n)/‖f(x_n)‖, z_n⟩`` at its outputs, with one probe ``z_n ~ N(0, I)`` for each example. No labels are read,
    and no head. Without a factorisation are taken ``F = (1/N) Σ f fᵀ``, f the gradient of one example, for the weights
    and biases of layer normalisations, and for vectors that are expanded over the examples, such as class tokens.

    As in the authors' program the rows of a packed projection of query, key and value (``in_proj_weight``) have a G
    each and one A. Other than there also linear layers that are no part of a transformer block have factors, and means
    are stored instead of sums. Found is what :func:`collect_gram` finds; a bias
    is taken with its weight if its name ends in ``bias`` where that of the weight ends in ``weight``. Embeddings,
    positions, other normalisations and layers that the features do not depend on have no factors.

    Corrected (EK-FAC, George et al. 2018, section 3), the curvature of a layer is ``V ⊗ U diag(D) (V ⊗ U)ᵀ``: U and V
    are the eigenvectors of A and G, and ``D = (1/N) Σ_n (Vᵀ ∇_n U)²`` the exact mean squares of single examples'
    gradients ``∇_n = Σ_t g_nt a_ntᵀ`` along them, instead of products of eigenvalues. It reads the examples twice. As
    ∇ is a sum over tokens, D grows with their number. What texts are padded with is no token.

    Evaluation mode is used whatever the module's own, and nothing about the module has changed afterwards. Products are
    computed in the activations' own precision, float32 at least, and summed in float64 where there is one. One process
    only.

    Args:
        module: ``[B, …]`` -> features ``[B, …, d]``; its parameters are θ0.
        loader: gives :class:`lit_merge.data.Batch`, pairs ``(images, labels)``, or images alone; corrected, the same
            ones again when it is iterated a second time.
        seed: of the probes. Which one an example has depends on its place in the loader, not on the batch size.
        normalised: whether the features are divided by their norm over the last dimension, as a zero-shot head does.
        convolutions: also take 2-D convolutions without groups, as linear layers on patches.
        inputs: the module's arguments of a batch; by default its ``inputs``.
        corrected: whether eigenvectors and corrected eigenvalues take the place of A and G.

    Returns:
        ``A.<weight>`` -> ``[in, in]``, or ``[in + 1, in + 1]`` with the bias; ``G.<weight>`` -> ``[out, out]``, or
        ``[3, out/3, out/3]`` of packed projections; ``F.<parameter>`` -> ``[d, d]``. Corrected ``U.``
        and ``V.<weight>`` of the shapes of A and G, and ``D.<weight>`` -> ``[out, in]``, with the bias ``[out, in +
        1]``, or ``[3, out/3, in + 1]``. For a weight ``[in, out]`` that is
        used as ``x @ W`` the name ends in ``.T``. In float32, or float64 for float64 parameters, on the CPU.

    Raises:
        ConfigurationError: the output is no tensor with a row for every example, no such layer was used, or one is
            used with its bias and without.
        DataError: there is no example.
        NonFiniteError: a value is NaN or infinite.
    """
    passed = partial(_passed, module=module, loader=loader, seed=seed, normalised=normalised, inputs=inputs)
    mode = _Factors(module, convolutions)
    passed(mode)
    if not any(name.startswith(OUTPUT_FACTOR) for name in mode.totals):
        raise ConfigurationError(
            f"collect_kfac: expected a module with linear layers on parameters of its own, got {type(module).__name__} "
            "without. Give the encoder itself, neither linearised nor with LoRA."
        )
    factors = {
        name: total
        for name, total in mode.means().items()
        if not name.startswith(INPUT_FACTOR) or OUTPUT_FACTOR + name[2:] in mode.totals  # reaches the features
    }
    check_finite(factors, "Kronecker factors")
    if corrected:
        bases = {name: torch.linalg.eigh(one)[1] for name, one in factors.items() if not name.startswith(WHOLE_FACTOR)}
        values = _Eigenvalues(module, convolutions, bases)
        passed(values)
        whole = {name: factor for name, factor in factors.items() if name.startswith(WHOLE_FACTOR)}
        renamed = {INPUT_FACTOR: INPUT_BASIS, OUTPUT_FACTOR: OUTPUT_BASIS}
        factors = {**{renamed[n[:2]] + n[2:]: basis for n, basis in bases.items()}, **values.means(), **whole}
        check_finite(factors, "corrected eigenvalues")
    return {name: factor.cpu() for name, factor in factors.items()}


def _passed(
    mode: _Factors,
    module: nn.Module,
    loader: Iterable[Any],
    seed: int,
    normalised: bool,
    inputs: Callable[[Any], tuple[Any, ...]] | None,
) -> None:
    """Let a mode see all examples, with the gradients along their probes."""
    generator = torch.Generator().manual_seed(seed)
    parameters = [value for value in module.parameters() if value.is_floating_point()]
    with torch.inference_mode(False), torch.enable_grad(), evaluating(module), requiring_gradients(parameters):
        for given, _ in examples(loader, module, inputs, padded=False):
            if mode.axes is None:
                mode.find_axes(module, given)
            for chunk in zip(*(one.split(_CHUNK) for one in given), strict=True):
                mode.begin(len(chunk[0]))
                with mode:
                    features = module(*chunk)
                mode.collect(_probed(features, len(chunk[0]), normalised, generator))


def _probed(features: Any, count: int, normalised: bool, generator: torch.Generator) -> Tensor:
    """The sum over the examples of ⟨features, probe⟩."""
    if not isinstance(features, Tensor) or features.ndim < 2 or len(features) != count:
        got = list(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise ConfigurationError(
            f"collect_kfac: expected features [{count}, …, d] of {count} examples, got {got}. Give the encoder that "
            "makes them."
        )
    wide = features.to(working_dtype(features.dtype))
    wide = F.normalize(wide, dim=-1) if normalised else wide
    drawn = [torch.randn(features.shape[1:], generator=generator, dtype=torch.float64) for _ in range(count)]
    return (wide * torch.stack(drawn).to(wide)).sum()


class _Factors(LayerInputs):
    """Sums the factors of what comes together with a parameter."""

    def __init__(self, module: nn.Module, convolutions: bool) -> None:
        super().__init__(module, convolutions)
        self.rules |= {F.layer_norm: self._layer_norm, torch.addmm: self._addmm, Tensor.expand: self._expand}
        self._vectors = {
            (value.data_ptr(), value.numel(), value.device): (name, value.dtype)
            for name, value in module.named_parameters()
            if value.ndim and value.numel() and value.numel() == value.shape[-1]
        }

        self.axes: list[int | None] | None = None
        self.count = 0
        self._shapes: list[tuple[torch.Size, Tensor | None]] | None = None

    def find_axes(self, module: nn.Module, given: tuple[Any, ...]) -> None:
        """Find along which dimension the examples lie, at every call that asks: the one that grows with their number.

        Sizes alone would not tell tokens from examples where there are as many of them. None where it is not one
        dimension, or where examples and tokens lie along one, a token of all examples after the other.
        """
        found = []
        for copies in (1, 2):
            self._shapes = []
            with torch.no_grad(), self:
                module(*(one[:1].repeat(copies, *[1] * (one.ndim - 1)) for one in given))
            found.append(self._shapes)
        self._shapes, self.axes = None, []
        for one, two in zip(*found, strict=True):
            grown = [
                axis for axis, (few, many) in enumerate(zip(one[0][:-1], two[0][:-1], strict=True)) if many == 2 * few
            ]
            apart = two[1] is None or torch.allclose(two[1].chunk(2)[0], two[1].chunk(2)[1], rtol=1e-3, atol=1e-5)
            self.axes.append(grown[0] if len(grown) == 1 and apart else None)

    def _measures(self, shape: torch.Size, rows: Tensor | None = None) -> bool:
        """Whether axes are being looked for, for which a shape is all that counts, and rows ``[R, k]`` themselves."""
        if self._shapes is None:
            return False
        self._shapes.append((shape, rows if rows is not None and rows.ndim == 2 else None))
        return True

    def begin(self, count: int) -> None:
        """Expect a batch of so many examples."""
        self._count, self._calls = count, iter(self.axes or ())
        self._outputs: list[tuple[Tensor, Callable[[Tensor], None]]] = []
        self.count += count

    def means(self) -> Params:
        """The sums over the number of examples."""
        return {name: (total / self.count).to(self.dtypes[name]) for name, total in self.totals.items()}

    def collect(self, target: Tensor) -> None:
        """Add the factors of the gradients of ``target``, with respect to the outputs since :meth:`begin`."""
        if not self._outputs:
            return
        outputs, notes = zip(*self._outputs, strict=True)
        for note, gradient in zip(notes, torch.autograd.grad(target, outputs, allow_unused=True), strict=True):
            if gradient is not None:
                note(gradient)
        self._outputs = []

    def _watch(self, output: Tensor, note: Callable[[Tensor], None]) -> Tensor:
        """The output, of which ``note`` gets the gradient; a copy, as the network may change it in place."""
        if not output.requires_grad:
            return output
        self._outputs.append((output, note))
        return output.clone()

    def _add(self, name: str, rows: Tensor, dtype: torch.dtype, tokens: float = 1.0, blocks: int = 1) -> None:
        """Add ``rowsᵀ rows / tokens`` of ``[R, k]``, in blocks of as many columns."""
        rows = rows.detach().to(working_dtype(rows.dtype))
        parts = rows.unflatten(1, (blocks, -1)).transpose(0, 1)
        with torch.autocast(rows.device.type, enabled=False):
            product = parts.mT @ parts
        product = (product if blocks > 1 else product[0]) / tokens
        product = product if product.device.type == "mps" else product.double()
        if name in self.totals and self.totals[name].shape != product.shape:
            raise ConfigurationError(
                f"collect_kfac: expected {name[2:]} to be used in one way, got it with its bias and without. "
                "Leave the layer out."
            )
        self.totals[name] = self.totals[name].add_(product) if name in self.totals else product
        self.dtypes[name] = working_dtype(dtype)

    def _layer(self, weight: Tensor, inputs: Tensor, bias: Tensor | None, output: Tensor, axis: int = -1) -> Tensor:
        """The output of a weight, watched if that is a parameter ``[out, in]``; its channels lie along ``axis``."""
        key, dtype = self.keys.get(identity_of(weight), (None, None))
        if key is None or dtype is None or self._measures(output.shape, inputs):
            return output
        given, example = inputs.detach(), next(self._calls, None)
        if bias is not None and self.keys.get(identity_of(bias), ("",))[0] == bias_of(key):
            given = torch.cat([given, given.new_ones(*given.shape[:-1], 1)], -1)
        return self._watch(output, self._note_of(key, dtype, given, axis, example))

    def _note_of(
        self, key: str, dtype: torch.dtype, given: Tensor, axis: int, example: int | None
    ) -> Callable[[Tensor], None]:
        """What is done with the gradient at a layer's output; its inputs ``[…, in]`` have a 1 for the bias."""
        rows = given.reshape(-1, given.shape[-1])
        tokens = len(rows) / self._count
        self._add(INPUT_FACTOR + key, rows, dtype, tokens)

        def note(gradient: Tensor) -> None:
            own = gradient.movedim(axis, -1).flatten(0, -2)
            self._add(OUTPUT_FACTOR + key, own, dtype, tokens, row_blocks(key))

        return note

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return self._layer(weight, input, bias, F.linear(input, weight, bias))

    def _matmul(self, input: Tensor, other: Tensor, **out: Any) -> Tensor:
        output = torch.matmul(input, other, **out)
        return self._layer(other.t(), input, None, output) if other.ndim == 2 else output

    def _addmm(self, input: Tensor, mat1: Tensor, mat2: Tensor, **settings: Any) -> Tensor:
        return self._layer(mat2.t(), mat1, input, torch.addmm(input, mat1, mat2, **settings))

    def _convolved(self, weight: Tensor, patches: Tensor, bias: Tensor | None, output: Tensor) -> Tensor:
        return self._layer(weight, patches, bias, output, axis=-3)

    def _layer_norm(
        self,
        input: Tensor,
        normalized_shape: Any,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> Tensor:
        output = F.layer_norm(input, normalized_shape, weight, bias, eps)
        if self._measures(input.shape):
            return output
        axis = next(self._calls, None)
        found = [None if one is None else self.keys.get(identity_of(one)) for one in (weight, bias)]
        if axis is None or len(normalized_shape) != 1 or not any(found):
            return output

        def note(gradient: Tensor) -> None:
            normal = F.layer_norm(input.detach(), normalized_shape, None, None, eps)
            for known, values in zip(found, (gradient * normal, gradient), strict=True):
                if known is not None:
                    single = values.movedim(axis, 0).reshape(self._count, -1, values.shape[-1]).sum(1)
                    self._add(WHOLE_FACTOR + known[0], single, known[1])

        return self._watch(output, note)

    def _expand(self, input: Tensor, *sizes: Any, **settings: Any) -> Tensor:
        output = input.expand(*sizes, **settings)
        if self._shapes is not None:
            return output
        known = self._vectors.get((input.data_ptr(), input.numel(), input.device))
        if known is None or output.numel() != self._count * input.numel() or output.shape[-1] != input.numel():
            return output
        return self._watch(output, partial(self._token, *known))

    def _token(self, name: str, dtype: torch.dtype, gradient: Tensor) -> None:
        self._add(WHOLE_FACTOR + name, gradient.reshape(self._count, -1), dtype)

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        embed_dim_to_check: int,
        num_heads: int,
        in_proj_weight: Tensor | None,
        in_proj_bias: Tensor | None,
        bias_k: Tensor | None,
        bias_v: Tensor | None,
        add_zero_attn: bool,
        dropout_p: float,
        out_proj_weight: Tensor,
        out_proj_bias: Tensor | None,
        **others: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """``nn.MultiheadAttention``: its projections here, the rest of it between identities."""
        identity = torch.eye(embed_dim_to_check, dtype=out_proj_weight.dtype, device=out_proj_weight.device)
        projected = True
        if others.get("use_separate_proj_weight"):
            biases = (None, None, None) if in_proj_bias is None else in_proj_bias.chunk(3)
            query, key, value = (
                self._linear(given, others[f"{which}_proj_weight"], bias)
                for which, given, bias in zip("qkv", (query, key, value), biases, strict=True)
            )
        elif query is key and key is value and in_proj_weight is not None:
            query, key, value = self._linear(query, in_proj_weight, in_proj_bias).chunk(3, -1)
        else:
            projected = False
        if projected:
            in_proj_weight = in_proj_bias = None
            others |= {"use_separate_proj_weight": True, **{f"{which}_proj_weight": identity for which in "qkv"}}
        attended, weights = F.multi_head_attention_forward(
            query,
            key,
            value,
            embed_dim_to_check,
            num_heads,
            in_proj_weight,
            in_proj_bias,
            bias_k,
            bias_v,
            add_zero_attn,
            dropout_p,
            identity,
            None,
            **others,
        )
        return self._linear(attended, out_proj_weight, out_proj_bias), weights


class _Eigenvalues(_Factors):
    """Sums the squares of single examples' gradients along the products of two bases."""

    def __init__(self, module: nn.Module, convolutions: bool, bases: Params) -> None:
        super().__init__(module, convolutions)
        del self.rules[F.layer_norm], self.rules[Tensor.expand]
        self._bases = bases

    def begin(self, count: int) -> None:
        """See :class:`_Factors`."""
        super().begin(count)
        self._uses: Counter[str] = Counter()
        self._gradients: dict[str, Tensor] = {}

    def collect(self, target: Tensor) -> None:
        """See :class:`_Factors`; of a layer that is used several times the gradients have been added up."""
        super().collect(target)
        for name, gradient in self._gradients.items():
            self._add_squares(name, gradient)

    def _add_squares(self, name: str, gradients: Tensor) -> None:
        squares = gradients.square().sum(0)
        squares = squares if squares.device.type == "mps" else squares.double()
        self.totals[name] = self.totals[name].add_(squares) if name in self.totals else squares

    def _note_of(
        self, key: str, dtype: torch.dtype, given: Tensor, axis: int, example: int | None
    ) -> Callable[[Tensor], None]:
        """See :class:`_Factors`."""
        if INPUT_FACTOR + key not in self._bases:
            return lambda gradient: None
        if example is None:
            raise ConfigurationError(
                f"collect_kfac: expected inputs of {key} that lie along one dimension for every example, got others. "
                "Collect without corrected."
            )
        name, blocks = EIGENVALUES + key, row_blocks(key)
        self.dtypes[name] = working_dtype(dtype)
        self._uses[name] += 1

        def single(values: Tensor) -> Tensor:
            return values.movedim(example, 0).reshape(self._count, -1, values.shape[-1]).to(working_dtype(values.dtype))

        def note(gradient: Tensor) -> None:
            with torch.autocast(given.device.type, enabled=False):
                rows, own = single(given), single(gradient.movedim(axis, -1))
                sides = self._bases[INPUT_FACTOR + key].to(rows), self._bases[OUTPUT_FACTOR + key].to(own)
                outer = sides[1] if blocks > 1 else sides[1][None]
                along = torch.einsum("nlbk,bkj->nblj", own.unflatten(-1, (blocks, -1)), outer)
                whole = along.mT @ (rows @ sides[0])[:, None]
            whole = whole if blocks > 1 else whole[:, 0]
            if self._uses[name] == 1:
                self._add_squares(name, whole)  # at once: those of all layers together would be large
            else:
                self._gradients[name] = self._gradients[name] + whole if name in self._gradients else whole

        return note
