"""The blocks of a network, each run alone on what came out of the one before, whatever the network does around them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as tree

from lit_merge.errors import ConfigurationError
from lit_merge.evaluation.statistics.fisher import requiring_gradients
from lit_merge.naming import block_path

__all__ = ["Blocks"]


class _ReachedError(Exception):
    """A block has run: what follows it is not needed."""

    def __init__(self, output: Any, arguments: Any) -> None:
        super().__init__("a block has run")
        self.output, self.arguments = output, arguments


class Blocks:
    """The blocks of a module in the order in which they run: those of an encoder before those of a decoder.

    A block is run inside its network: the network makes masks, positions and whatever else its blocks are given, the
    blocks before return what was recorded of the last of them, and the pass ends after the block. That this gives a
    block the same arguments as a whole pass is checked with the first example.

    Args:
        module: has numbered blocks, as :func:`lit_merge.naming.block_of` finds them.
        given: the module's arguments for some examples.

    Attributes:
        paths: of the blocks' modules, in order.
        examples_axis: along which dimension of a block's output the examples lie; None if it is none of the first two.

    Raises:
        ConfigurationError: the module has no blocks, one of them runs several times, or a block takes more than what
            the one before it gives.
    """

    def __init__(self, module: nn.Module, given: Sequence[Any]) -> None:
        self.module = module
        names = [name for name, _ in module.named_parameters()]
        found = dict.fromkeys(path for name in names if (path := block_path(name)) is not None)
        if not found:
            raise ConfigurationError(
                f"calibrate: expected a network with numbered blocks, got {type(module).__name__} without. Merge it "
                "by recipe regmean instead, or name its blocks, e.g. layers.0."
            )
        one = tree.tree_map_only(Tensor, lambda part: _repeated(part, 1), tuple(given))
        two = tree.tree_map_only(Tensor, lambda part: _repeated(part, 2), tuple(given))
        seen = self._order(list(found), two)
        self.paths = tuple(seen)
        self._names = {path: [name for name in names if block_path(name) == path] for path in self.paths}
        outputs = [self._check(two, seen), self._check(one)]
        first, second = (_hidden(output).shape for output in reversed(outputs))
        grown = [axis for axis, (few, many) in enumerate(zip(first, second, strict=True)) if many == 2 * few]
        self.examples_axis = grown[0] if len(first) == 3 and len(grown) == 1 and grown[0] < 2 else None
        self._around = self._outside(one)

    def stack(self, index: int) -> str:
        """The list that a block belongs to, such as that of the encoder."""
        return self.paths[index].rpartition(".")[0]

    def names(self, index: int) -> list[str]:
        """The parameters of a block."""
        return self._names[self.paths[index]]

    def around(self, index: int) -> list[str]:
        """The parameters outside of all blocks that a block's output depends on, when the blocks before it are known.

        Embeddings at the first one, what an encoder ends with at a decoder's, a table of relative positions at all.
        """
        return self._around[index]

    def part(self, index: int) -> nn.Module:
        """A block's module."""
        return self.module.get_submodule(self.paths[index])

    def run(self, index: int, given: Sequence[Any], recorded: Mapping[str, Any]) -> Any:
        """What a block gives.

        Args:
            index: of the block.
            given: the module's arguments.
            recorded: stack -> what the last block of it that has run gave.
        """
        return self._reach(index, given, recorded).output

    def used_tokens(self, given: Sequence[Any], recorded: Mapping[str, Any], output: Any) -> Tensor | None:
        """Of which tokens of the last block the network's output depends on, by its gradient.

        That of a class token alone, of all that a mean is taken over, of those that predict.

        Args:
            given: the module's arguments.
            recorded: stack -> what the last block of it that has run gave, of the stacks before the last block's.
            output: what the last block gave.

        Returns:
            bool ``[B, L]``; None if the output is not ``[B, L, d]``, or the network's output no tensor.
        """
        if self.examples_axis is None:
            return None
        with torch.enable_grad():
            hidden = _hidden(output).detach().clone().requires_grad_()
            last = _with_hidden(output, hidden)
            stand_ins = {path: recorded.get(self.stack(index)) for index, path in enumerate(self.paths)}
            stand_ins[self.paths[-1]] = last
            with self._returning(stand_ins):
                result = self.module(*given)
            if not isinstance(result, Tensor):
                return None
            probe = torch.randn(result.shape, generator=torch.Generator().manual_seed(0)).to(result)
            (gradient,) = torch.autograd.grad((result * probe).sum(), hidden, allow_unused=True)
        if gradient is None:
            return None
        used = (gradient != 0).any(-1)
        return used if self.examples_axis == 0 else used.mT

    def _order(self, paths: Sequence[str], given: Sequence[Any]) -> dict[str, Any]:
        """Path -> the arguments in a whole pass, in the order of the calls."""
        seen: dict[str, Any] = {}

        def noting(path: str, forward: Callable[..., Any]) -> Callable[..., Any]:
            def noted(*arguments: Any, **others: Any) -> Any:
                if path in seen:
                    raise ConfigurationError(
                        f"calibrate: expected blocks that run once in a pass, got {path}, which runs again. Merge it "
                        "by recipe regmean instead."
                    )
                seen[path] = _kept((arguments, others))
                return forward(*arguments, **others)

            return noted

        with torch.no_grad(), self._patched(dict.fromkeys(paths, noting)):
            self.module(*given)
        return seen

    def _check(self, given: Sequence[Any], expected: Mapping[str, Any] | None = None) -> Any:
        """Run all blocks one after the other; the output of the last one."""
        recorded: dict[str, Any] = {}
        output: Any = None
        with torch.no_grad():
            for index, path in enumerate(self.paths):
                reached = self._reach(index, given, tree.tree_map_only(Tensor, Tensor.clone, recorded))
                output = recorded[self.stack(index)] = reached.output
                if expected is not None and not _same(reached.arguments, expected[path]):
                    raise ConfigurationError(
                        f"calibrate: expected blocks that take what the one before them gives, got {path}, which takes "
                        "something else. Merge it by recipe regmean instead."
                    )
        return output

    def _outside(self, given: Sequence[Any]) -> list[list[str]]:
        """For every block the parameters that :meth:`around` gives, by the graph of its output."""
        own = {name: value for name, value in self.module.named_parameters() if value.is_floating_point()}
        outside = {name: value for name, value in own.items() if block_path(name) is None}
        recorded: dict[str, Any] = {}
        found = []
        with torch.inference_mode(False), torch.enable_grad(), requiring_gradients(own.values()):
            for index in range(len(self.paths)):
                output = self._reach(index, given, recorded).output
                used = _leaves(output) or set(outside.values())  # all of them for a network without a graph
                found.append([name for name, value in outside.items() if value in used])
                recorded[self.stack(index)] = tree.tree_map_only(Tensor, Tensor.detach, output)
        return found

    def _reach(self, index: int, given: Sequence[Any], recorded: Mapping[str, Any]) -> _ReachedError:
        def stopping(path: str, forward: Callable[..., Any]) -> Callable[..., Any]:
            def stopped(*arguments: Any, **others: Any) -> Any:
                seen = _kept((arguments, others))
                raise _ReachedError(forward(*arguments, **others), seen)

            return stopped

        stand_ins = {path: recorded.get(self.stack(earlier)) for earlier, path in enumerate(self.paths[:index])}
        with self._returning(stand_ins), self._patched({self.paths[index]: stopping}):
            try:
                self.module(*given)
            except _ReachedError as reached:
                return reached
        raise ConfigurationError(
            f"calibrate: expected every pass to run all blocks, got one without {self.paths[index]}. Merge it by "
            "recipe regmean instead."
        )

    @contextmanager
    def _returning(self, outputs: Mapping[str, Any]) -> Iterator[None]:
        """Blocks that do nothing but return what was recorded."""

        def returning(path: str, forward: Callable[..., Any]) -> Callable[..., Any]:
            return lambda *arguments, **others: outputs[path]

        with self._patched(dict.fromkeys(outputs, returning)):
            yield

    @contextmanager
    def _patched(self, makers: Mapping[str, Callable[[str, Callable[..., Any]], Callable[..., Any]]]) -> Iterator[None]:
        """Other ``forward`` methods for a while."""
        parts = {path: self.module.get_submodule(path) for path in makers}
        before = {path: vars(part).get("forward") for path, part in parts.items()}
        try:
            for path, part in parts.items():
                vars(part)["forward"] = makers[path](path, part.forward)
            yield
        finally:
            for path, part in parts.items():
                if before[path] is None:
                    vars(part).pop("forward", None)
                else:
                    vars(part)["forward"] = before[path]


def _leaves(output: Any) -> set[Tensor]:
    """The tensors that an output was computed from and could have a gradient of."""
    seen = {one.grad_fn for one in tree.tree_leaves(output) if isinstance(one, Tensor) and one.grad_fn is not None}
    waiting, found = list(seen), set[Tensor]()
    while waiting:
        node = waiting.pop()
        if hasattr(node, "variable"):
            found.add(node.variable)
        more = {following for following, _ in node.next_functions if following is not None} - seen
        seen |= more
        waiting += more
    return found


def _repeated(value: Tensor, times: int) -> Tensor:
    """The first example, several times."""
    return value[:1].repeat(times, *[1] * (value.ndim - 1))


def _kept(value: Any) -> Any:
    """The tensors as they are now: a network may write into them later."""
    return [one.detach().clone() for one in tree.tree_leaves(value) if isinstance(one, Tensor)]


def _same(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    if [part.shape for part in one] != [part.shape for part in other]:
        return False
    pairs = zip(one, other, strict=True)
    return all(torch.allclose(a.double(), b.double(), rtol=1e-3, atol=1e-5, equal_nan=True) for a, b in pairs)


def _hidden(output: Any) -> Tensor:
    """The activations in a block's output: the first tensor."""
    found = next((one for one in tree.tree_leaves(output) if isinstance(one, Tensor)), None)
    if found is None:
        raise ConfigurationError(
            f"calibrate: expected blocks that give tensors, got {type(output).__name__}. Merge it by recipe regmean "
            "instead."
        )
    return found


def _with_hidden(output: Any, hidden: Tensor) -> Any:
    leaves, structure = tree.tree_flatten(output)
    place = next(index for index, one in enumerate(leaves) if isinstance(one, Tensor))
    return tree.tree_unflatten([*leaves[:place], hidden, *leaves[place + 1 :]], structure)
