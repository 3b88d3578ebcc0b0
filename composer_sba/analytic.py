"""AnalyticHead: the expected divergence over the head's vicinity, taken where the head runs. Plain PyTorch."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.hooks import RemovableHandle

from composer_sba.cuts import Forward, check_cut, evaluation
from composer_sba.errors import CutLayerError
from composer_sba.functional import expected_soft_label_kl
from composer_sba.layers import find_layers
from composer_sba.one_pass import OnePass
from composer_sba.vicinity import Vicinity, as_vicinity


class AnalyticHead:
    """Watches the last ``nn.Linear`` of a network and, while armed, takes the expected divergence over its vicinity.

    What :class:`.LatentExpander` with ``layers='head'`` and :func:`.soft_label_kl` give on average, without virtual
    samples: the network runs on its N raw rows. See :func:`.expected_soft_label_kl`.

    Args:
        model (torch.nn.Module): The network. It gets a hook, which :meth:`remove` takes away, and no parameters.
        vicinity (Vicinity | Mapping, optional): The law of the virtual samples, or a mapping of its arguments. Default:
            ``Vicinity()``.
        stop_gradient (bool, optional): Treat the soft label as a constant. Default: ``True``.

    Raises:
        CutLayerError: If the model has no ``nn.Linear``.
        ValueError: If another argument lies outside its range.

    Note:
        The divergence and its gradients are computed in the forward pass, in float32 or more, where FSDP has gathered
        the head's weights; the backward pass only scales them. So it can be differentiated once.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
        >>> head = AnalyticHead(model)
        >>> head.arm(step=0)
        0
        >>> logits = model(torch.zeros(2, 8))
        >>> head.kl().shape, head.disarm()
        (torch.Size([]), None)
    """

    def __init__(
        self,
        model: nn.Module,
        vicinity: Vicinity | Mapping[str, Any] = Vicinity(),
        *,
        stop_gradient: bool = True,
    ) -> None:
        self.model = model
        self.cuts = find_layers(model, 'head')
        self.vicinity = as_vicinity(vicinity)
        self.stop_gradient = stop_gradient
        self._linear = self.cuts[0].linear
        self._pass = OnePass(model)
        self._kl: torch.Tensor | None = None
        self._handle: RemovableHandle | None = None
        self.attach()

    def attach(self) -> None:
        """Put the hook in, as the constructor does, in place of one that is there."""
        self.remove()
        self._pass.attach()
        self._handle = self.cuts[0].hook_linear(self._at_head)

    def arm(self, step: int, microbatch: int = 0) -> int:
        """Have the next forward pass take the divergence. Nothing is drawn: ``step`` and ``microbatch`` do not matter.

        Returns:
            int: Index of the head in ``cuts``, 0.
        """
        self.disarm()
        self._pass.arm()
        return 0

    def disarm(self) -> None:
        """Leave the network as it was, and forget the divergence."""
        self._pass.disarm()
        self._kl = None

    def kl(self) -> torch.Tensor:
        """Return the divergence of the armed forward pass.

        Returns:
            torch.Tensor: Nats, the mean over the rows. Shape ``()``, float32, or float64 for float64 logits.

        Raises:
            RuntimeError: If the head did not run since :meth:`arm`.
        """
        if self._kl is None:
            raise RuntimeError(
                "No expected divergence: the layer 'head' did not run in the armed forward pass. Was the model "
                'compiled before the AnalyticHead was made, or does forward bypass the layer?',
            )
        return self._kl

    def check(self, forward: Forward) -> None:
        """Refuse a model whose logits are not what the head returns, by running it on a real batch.

        Args:
            forward (Callable): Runs the model on a batch of at least two rows and returns its logits.

        Raises:
            CutLayerError: Saying what stands between the head and the logits.
        """
        seen: list[tuple[Any, torch.Tensor]] = []
        with evaluation(self.model):
            check_cut(self.model, self.cuts[0], forward)
            handle = self._linear.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
            try:
                logits = forward()
            finally:
                handle.remove()
        latent, output = seen[0]
        reason = None
        if latent.ndim != 2:
            reason = f'the last nn.Linear gets an input of shape {tuple(latent.shape)}, not (N, Q)'
        elif not torch.allclose(F.log_softmax(output.float(), -1), F.log_softmax(logits.float(), -1), 1e-3, 1e-3):
            reason = "the model's predictions are not those that its last nn.Linear returns"
        if reason is not None:
            raise CutLayerError(f"estimator='analytic' has no closed form here: {reason}. Use estimator='sampled'.")

    def remove(self) -> None:
        """Take the hooks off the network."""
        self._pass.remove()
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _at_head(self, module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        if self._pass.on and self._kl is None:  # else run again, by activation checkpointing
            self._kl = self._expect(args[0], output)

    @torch.compiler.disable
    def _expect(self, latent: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled():
            raise CutLayerError(
                "estimator='analytic' cannot learn from a head that runs without gradients, as in reentrant activation "
                'checkpointing: set activation_checkpointing_reentrant to false, leave the head out of it, or use '
                "estimator='sampled'.",
            )
        inputs = [latent, logits, self._linear.weight, *([] if self._linear.bias is None else [self._linear.bias])]
        # Wide before they are leaves: gradients must not underflow before a GradScaler scales them.
        wide = torch.promote_types(logits.dtype, torch.float32)
        leaves = [value.detach().to(wide).requires_grad_(value.requires_grad) for value in inputs]
        # Not to be run again by activation checkpointing, whose hooks these take the place of.
        with torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, lambda saved: saved):
            linear = _Linear(leaves[2], leaves[3] if len(leaves) > 3 else None)
            kl = expected_soft_label_kl(leaves[0], linear, leaves[1], self.vicinity, stop_gradient=self.stop_gradient)
            wanted = [leaf for leaf in leaves if leaf.requires_grad]
            gradients = torch.autograd.grad(kl, wanted, materialize_grads=True) if wanted else ()
            return _WithGradients.apply(kl.detach(), gradients, *(value for value in inputs if value.requires_grad))


class _Linear(NamedTuple):
    weight: torch.Tensor
    bias: torch.Tensor | None


class _WithGradients(torch.autograd.Function):
    """A value that comes with its gradients."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, gradients: tuple[torch.Tensor, ...], *inputs: torch.Tensor) -> Any:
        ctx.save_for_backward(*gradients)
        ctx.dtypes = [each.dtype for each in inputs]
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> Any:
        scaled = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return None, None, *((upstream * gradient).to(dtype) for gradient, dtype in scaled)
