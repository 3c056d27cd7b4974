"""What a search for settings may choose from: the configured settings, and others beside them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from pydantic import ValidationError

from s2seg.errors import InputError, ModelError, S2SegWarning
from s2seg.training.config import TrainConfig
from s2seg.training.fit import check_fit
from s2seg.training.loss_names import parse_loss
from s2seg.training.weights import IMAGENET

LOSSES: Final = (
    "cross_entropy",
    "focal",
    "0.7*cross_entropy + 0.3*dice",
    "0.3*cross_entropy + 0.7*dice",
    "0.7*cross_entropy + 0.3*lovasz",
    "0.3*cross_entropy + 0.7*lovasz",
    "0.7*cross_entropy + 0.3*focal_tversky",
    "0.4*cross_entropy + 0.6*focal_tversky",
)
ENCODERS: Final = ("resnet18", "resnet34", "mobilenet_v2", "efficientnet-b0")
BATCH_SIZES: Final = (8, 16, 32)

Settings = dict[str, Any]
"""``learning_rate``, ``loss``, ``encoder``, ``batch_size`` and ``chip_size``, all of them or some."""


@dataclass(frozen=True)
class SearchSpace:
    """What may be chosen; all else stays as it is configured.

    Parameters
    ----------
    learning_rate
        Least and greatest, drawn on a logarithmic scale.
    loss, encoder, batch_size, chip_size
        One of each is drawn. The first is the configured one.
    """

    learning_rate: tuple[float, float]
    loss: tuple[str, ...]
    encoder: tuple[str, ...]
    batch_size: tuple[int, ...]
    chip_size: tuple[int, ...]

    def to_dict(self) -> dict[str, list[Any]]:
        """Return it as JSON can hold it."""
        return {name: list(values) for name, values in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, list[Any]]) -> SearchSpace:
        """Return what :meth:`to_dict` was called on."""
        return cls(**{name: tuple(choices) for name, choices in values.items()})


def configured(config: TrainConfig) -> Settings:
    """Return the settings that a configuration has, word for word."""
    return {
        "learning_rate": config.optimizer.learning_rate,
        "loss": config.loss,
        "encoder": config.network.encoder,
        "batch_size": config.fit.batch_size,
        "chip_size": config.chips.size,
    }


def changed(config: TrainConfig, settings: Settings) -> TrainConfig:
    """Return a configuration with other settings.

    Chips of another size keep their overlap, and further windows (``chips.sizes``) their scale: stride and sizes grow
    and shrink with the size.

    Raises
    ------
    InputError
        For settings that make no sense together.
    """
    values = config.model_dump()
    new = configured(config) | settings
    size, before = new["chip_size"], config.chips.size
    values["chips"] |= {
        "size": size,
        "stride": max(1, round(config.chips.stride * size / before)),
        "sizes": [max(1, round(window * size / before)) for window in config.chips.sizes],
    }
    values["optimizer"]["learning_rate"] = new["learning_rate"]
    values["network"]["encoder"] = new["encoder"]
    values["fit"]["batch_size"] = new["batch_size"]
    values["loss"] = new["loss"]
    try:
        return TrainConfig.model_validate(values)
    except ValidationError as error:
        said = ", ".join(f"{name} {value}" for name, value in settings.items())
        raise InputError(f"{said} cannot be trained: {error.errors(include_url=False)[0]['msg']}") from error


def search_space(config: TrainConfig, cut: Callable[[int], object]) -> SearchSpace:
    """Decide what a search chooses from, and try beforehand what would otherwise end it after hours.

    Parameters
    ----------
    config
        Its section ``tune`` says what is tried beside the configured settings. Of the usual choices, which stand in
        for a key that is null, those that cannot be trained here are left out.
    cut
        Cuts the chips of a size.

    Returns
    -------
    SearchSpace
        With the configured settings in it, whatever ``tune`` says.

    Raises
    ------
    S2SegError
        If the configuration, or a choice that ``tune`` names, cannot be trained or cut.

    Warns
    -----
    S2SegWarning
        Which of the usual choices are left out, and why.
    """
    asked, settings, left_out = config.tune, configured(config), []
    check_fit(config)
    cut(config.chips.size)

    def trainable(name: str, named: Sequence[Any] | None, usual: Sequence[Any], **beside: Any) -> tuple[Any, ...]:
        found = [settings[name]]
        for value in usual if named is None else named:
            if value in found:
                continue
            try:
                check_fit(changed(config, {name: value, **beside}))
                if name == "chip_size":
                    cut(value)
            except (InputError, ModelError) as error:
                if named is not None:
                    raise
                left_out.append(f"{name} {value} ({error})")
            else:
                found.append(value)
        return tuple(found)

    low, high = asked.learning_rate
    batch_sizes = trainable("batch_size", asked.batch_sizes, BATCH_SIZES)
    space = SearchSpace(
        learning_rate=(min(low, settings["learning_rate"]), max(high, settings["learning_rate"])),
        loss=_losses(config.loss, LOSSES if asked.losses is None else asked.losses),
        encoder=trainable("encoder", asked.encoders, _usual_encoders(config)),
        batch_size=batch_sizes,
        # with the batch that takes the most memory
        chip_size=trainable("chip_size", asked.chip_sizes, _usual_sizes(config), batch_size=max(batch_sizes)),
    )
    if left_out:
        warnings.warn(f"the search goes without {'; '.join(left_out)}", S2SegWarning, stacklevel=3)
    return space


def _losses(own: str, others: Sequence[str]) -> tuple[str, ...]:
    """The configured loss as it is written, and those that mean something else."""
    found = {frozenset(parse_loss(own)): own}
    for text in others:
        found.setdefault(frozenset(parse_loss(text)), text)
    return tuple(found.values())


def _usual_encoders(config: TrainConfig) -> tuple[str, ...]:
    # weights from a file fit one encoder only
    return ENCODERS if config.network.weights in (None, IMAGENET) else ()


def _usual_sizes(config: TrainConfig) -> tuple[int, ...]:
    """Half and twice the chips' size, as far as the network's stride divides them."""
    stride, size = config.network.stride, config.chips.size
    return max(1, round(size / 2 / stride)) * stride, 2 * size
