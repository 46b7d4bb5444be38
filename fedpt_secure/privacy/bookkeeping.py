"""Per-example gradients of LoRA's B matrices, and of the head's bias, from one forward and one backward pass.

Book-keeping (Bu et al. 2023, "Differentially private optimization on large model at small cost"): a linear layer's
weight gradient for example i is g_i^T x_i, with x_i the layer's input and g_i the gradient at its output, both over the
example's positions; one backward pass meets all of them. Bu et al. go on to take norms from Gram matrices and to form
the clipped sum in a second product, so as never to hold a gradient per example. For B that would cost more: with input
width r, T positions and output width o, g_i^T x_i takes T o r multiplications and o r numbers, the Gram matrices
T^2 (o + r), and r is below T. It would also sum in float32, where a term's bound holds up to rounding only.

Opacus's hooks compute the same products. They leave the parameters' ordinary gradient switched on, so that autograd
forms it as well; here the parameters need no gradient and only the layers' outputs do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch

from fedpt_secure.errors import PrivacyError
from fedpt_secure.lm.output_classes import StepClasses
from fedpt_secure.lm.part import WHOLE, TrainedPart
from fedpt_secure.lm.small import SmallLM
from fedpt_secure.privacy.examples import SampledPositions, SmallExample, example_loss, example_losses

ExampleGradients = Callable[[Sequence[SmallExample]], torch.Tensor]
"""Per-example gradients, float32 `[batch, d]` on the CPU, in the order of `SmallLM.adapter_vector`."""


@contextmanager
def bookkeeping_gradients(
    small: SmallLM,
    *,
    positions: SampledPositions | None = None,
    classes: StepClasses | None = None,
    part: TrainedPart = WHOLE,
) -> Iterator[ExampleGradients]:
    """Yield the function; on leaving, the model is as it was.

    One example by itself is computed as `small.compute` says; several in one pass in the model's own precision.

    Args:
        positions: the loss tokens that count; all of them if None.
        classes: what the softmax is over (`lm.output_classes`), for one example a pass alone; all of them if None.
        part: what is trained; gradients are 0 elsewhere, and nothing is differentiated below its lowest layer.

    Raises:
        PrivacyError: a trained parameter is not the weight, or the bias, of a linear layer of which nothing else is
            trained, or, from the function, such a layer does not run exactly once, or sees no axis of examples.
    """
    layers = _trained_layers(small)
    parameters = small.trainable
    columns = small.trains(part)
    trained = {index for index, count in enumerate(columns) if count}
    gradients: dict[int, torch.Tensor] = {}

    def watch(index: int) -> Callable[[torch.nn.Module, tuple[torch.Tensor], torch.Tensor], None]:
        def on_forward(_: torch.nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
            x = inputs[0].detach()

            def on_backward(g: torch.Tensor) -> None:
                if index in gradients or x.dim() != 3:
                    raise PrivacyError("a trained layer runs twice, or not on [examples, positions, width]")
                if layers[index].bias is parameters[index]:
                    gradients[index] = g.float().sum(1)
                else:
                    gradients[index] = torch.bmm(g.transpose(1, 2).float(), x[..., : columns[index]].float())

            if not output.requires_grad:  # nothing below this layer is trained: the backward pass ends here
                output.requires_grad_()
            output.register_hook(on_backward)  # type: ignore[no-untyped-call]

        return on_forward

    def compute(batch: Sequence[SmallExample]) -> torch.Tensor:
        gradients.clear()
        if len(batch) == 1:
            loss = example_loss(small, batch[0], positions=positions, classes=classes, part=part)
        else:
            loss = example_losses(small, batch, positions=positions).sum()
        torch.autograd.backward(loss)
        if gradients.keys() != trained or any(len(part) != len(batch) for part in gradients.values()):
            raise PrivacyError("a trained layer did not run once for each example")
        rows = []
        for index, parameter in enumerate(parameters):
            if index in trained and gradients[index].shape[1:] == parameter.shape:
                row = gradients.pop(index).cpu()
            else:
                row = torch.zeros(len(batch), *parameter.shape)
                if index in trained:
                    row[..., : columns[index]] = gradients.pop(index).cpu()
            rows.append(row)
        return torch.cat(small.in_units(rows), dim=1)

    with ExitStack() as undo:
        for index, layer in enumerate(layers):
            parameters[index].requires_grad_(False)
            undo.callback(parameters[index].requires_grad_, True)
            if index in trained:
                undo.callback(layer.register_forward_hook(watch(index)).remove)
        yield compute


def _trained_layers(small: SmallLM) -> list[torch.nn.Linear]:
    """The layer that each trained parameter is of; of no layer are there two."""
    owners: dict[int, torch.nn.Linear] = {}
    for module in small.model.modules():
        if isinstance(module, torch.nn.Linear):
            trained = [parameter for parameter in (module.weight, module.bias) if _is_trained(parameter)]
            if len(trained) == 1:
                owners[id(trained[0])] = module
    layers = [owners[id(parameter)] for parameter in small.trainable if id(parameter) in owners]
    if len(layers) != len(small.trainable):
        raise PrivacyError("a trained parameter is not alone of a linear layer to be trained")
    return layers


def _is_trained(parameter: torch.Tensor | None) -> bool:
    return parameter is not None and parameter.requires_grad
