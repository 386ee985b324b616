"""Options of a run, set by command-line flags and saved in config.json."""

import dataclasses
import functools
from typing import Any

import optax

import rmsprop_jax

# Each has a peak learning rate that trains stably, within a factor of 3 of the best.
OPTIMIZERS = dict(
    rmsprop=(rmsprop_jax.rmsprop, 0.01),
    sgd=(optax.sgd, 0.7),
    momentum=(functools.partial(optax.sgd, momentum=0.9), 0.3),
    adam=(optax.adam, 0.01),
    adagrad=(optax.adagrad, 0.4),
)
SCHEDULES = ("constant", "cosine", "warmup_cosine")


def option(default, help, allowed=None) -> Any:
    """Create a dataclass field with a help text and a container of allowed values."""
    return dataclasses.field(default=default, metadata=dict(help=help, allowed=allowed))


@dataclasses.dataclass(frozen=True)
class Config:
    """Options that determine the result of a run."""

    optimizer: str = option(
        "rmsprop", "rmsprop, sgd, momentum, adam, adagrad or all", [*OPTIMIZERS, "all"]
    )
    learning_rate: float | None = option(None, "peak; default: set per optimizer")
    decay: float = option(0.9, "rmsprop: decay rate of the mean squared gradient")
    eps: float = option(1e-8, "rmsprop: added to that mean inside the root")
    momentum: float | None = option(None, "rmsprop: decay rate of the momentum")
    centered: bool = option(False, "rmsprop: divide by the standard deviation")
    zero: bool = option(False, "shard the optimizer state over the devices (ZeRO)")
    schedule: str = option("cosine", "constant, cosine or warmup_cosine", SCHEDULES)
    epochs: int = option(20, "passes over the training images", range(1, 10**6))
    batch_size: int = option(32, "a multiple of the device count", range(1, 1438))
    seed: int = option(0, "for the parameters and the image order", range(2**31))

    def __post_init__(self):
        """Raise ValueError if an option is invalid."""
        for field in dataclasses.fields(self):
            value, allowed = getattr(self, field.name), field.metadata["allowed"]
            if allowed and value not in allowed:
                raise ValueError(f"{field.name} must be in {allowed}, got {value!r}.")
        given = [k for k, v in self.rmsprop.items() if v != getattr(Config, k)]
        if given and self.optimizer not in ("rmsprop", "all"):
            raise ValueError(f"{given[0]} is for rmsprop, not {self.optimizer}.")
        rmsprop_jax.rmsprop(self.learning_rate or 0.0, **self.rmsprop)

    @property
    def rmsprop(self):
        """Return the options that are arguments of `rmsprop_jax.rmsprop`."""
        names = ("decay", "eps", "momentum", "centered")
        return {name: getattr(self, name) for name in names}
