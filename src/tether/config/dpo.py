"""What `tether dpo` takes."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Annotated, Literal

from tether.config.keys import Section, at_least, positive, within
from tether.config.reward import PairsConfig
from tether.config.sections import DataConfig, MicrobatchTokens, ReferencedModelConfig, TrainingConfig
from tether.errors import ConfigError

_NOISE = within(
    0, 0.5, "from one half on, a label would speak for the answer that was not preferred", "Set {key} below 0.5.",
    ends="[)",
)  # fmt: skip
_HELD_OUT = within(
    0, 1, "without training data nothing can be learned", "Set e.g. 0.1; 0 holds none out, and reports no accuracy.",
    ends="[)",
)  # fmt: skip


@dataclass(frozen=True)
class DPOSection(Section):
    """Direct preference optimization."""

    loss: Literal["sigmoid", "ipo", "simpo", "orpo", "unpaired", "kto"] = "sigmoid"
    """sigmoid: DPO; with people who choose by P = σ(Δscore) it has PPO's optimum. ipo: its margin is bounded, for
    labels without noise; how often an answer wins counts, not by how much. simpo: length-normalized, and no reference
    holds it. orpo: imitation of the chosen answer plus an odds ratio, no reference. unpaired: single answers labeled
    good or bad, with a learned level for every prompt; PPO's optimum. kto: the same data; its optimum is near the
    reference restricted to answers that are good more often than not, however strong the preferences are."""
    beta: Annotated[float, positive("no preference could move the policy, or the reversed one would")] = 0.1
    """β: log-odds of a preference per nat of log-ratio; less lets the policy go further. ipo: τ. simpo: of the mean
    log-prob, where 2 to 2.5 is usual. orpo: weight of the odds ratio."""
    gamma: Annotated[float, at_least(0, "the better answer would be asked to fall behind")] = 0.0
    """simpo: lead in log-odds that the better answer is asked for; half of beta is usual."""
    flipped: Annotated[float, _NOISE] = 0.0
    """Share of labels known to be wrong: on them the loss is, on average, that of the right labels (robust DPO)."""
    smoothing: Annotated[float, _NOISE] = 0.0
    """Never trust a label by more than 1 - smoothing (cDPO): margins stay finite, at another optimum."""
    average: bool = False
    """Log-ratios per token instead of per response, so that length does not count; simpo and orpo always do."""
    nll: Annotated[float, at_least(0, "the chosen answers would be driven away")] = 0.0
    """Weight of the negative log-likelihood of the chosen (or good) answers, nats per token: what keeps their own
    log-prob from falling along with the rejected ones'. 1 is usual. orpo has it always."""
    epochs: Annotated[int, at_least(1, "nothing would be trained")] = 1
    """Passes over the data; more than one or two overfits human labels."""
    batch: Annotated[int, at_least(1, "an optimizer step would have no pairs")] = 32
    """Pairs (or single answers) in an optimizer step."""
    test_fraction: Annotated[float, _HELD_OUT] = 0.1
    """Share of the data held out for the reported accuracy, as in tether reward."""
    microbatch_tokens: MicrobatchTokens = 8192
    """Padded tokens in memory at once; never changes the result."""

    @property
    def has_pairs(self) -> bool:
        """Whether the loss compares two answers; else it looks at single ones."""
        return self.loss not in ("unpaired", "kto")

    @property
    def has_reference(self) -> bool:
        """Whether the loss depends on the reference."""
        return self.loss not in ("simpo", "orpo")

    def check(self, key: str) -> None:
        for field_ in fields(self):
            value = getattr(self, field_.name)
            read_by = _READ_BY.get(field_.name)
            if read_by and self.loss not in read_by and value != field_.default:
                raise ConfigError(
                    f"{key}.{field_.name}={str(value).lower()} with {key}.loss={self.loss}, which does not read it: it "
                    f"would be ignored. Leave it out, or set {key}.loss to {_one_of(read_by)}."
                )
        if self.flipped and self.smoothing:
            raise ConfigError(
                f"{key}.flipped={self.flipped} and {key}.smoothing={self.smoothing} pull labels in opposite "
                "directions: one undoes noise, the other adds doubt. Keep one of them."
            )


_READ_BY: dict[str, tuple[str, ...]] = {  # all that is not here, every loss reads
    "gamma": ("simpo",),
    "average": ("sigmoid", "ipo", "unpaired", "kto"),
    "nll": ("sigmoid", "ipo", "simpo", "unpaired", "kto"),
}


def _one_of(names: tuple[str, ...]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"


@dataclass(frozen=True)
class DPOConfig(TrainingConfig):
    """Everything of a run that learns from preferences directly."""

    model: ReferencedModelConfig
    data: PairsConfig
    dpo: DPOSection = field(default_factory=DPOSection)

    def __post_init__(self) -> None:
        if not isinstance(self.data, PairsConfig) and isinstance(self.data, DataConfig):
            object.__setattr__(self, "data", PairsConfig.of(self.data))

    def check(self, key: str) -> None:
        super().check(key)
        if self.model.reference is not None and not self.dpo.has_reference:
            raise ConfigError(
                f"model.reference={self.model.reference} with dpo.loss={self.dpo.loss}, which has no reference: it "
                "would be ignored. Leave it out, or set dpo.loss to sigmoid."
            )
        if self.optim.critic_lr is not None and self.dpo.loss != "unpaired":
            raise ConfigError(
                f"optim.critic_lr={self.optim.critic_lr} with dpo.loss={self.dpo.loss}: only unpaired learns a level "
                "beside the policy, so it would be ignored. Leave it out."
            )

    def microbatch(self, longest: int | None, ranks: int = 1) -> tuple[int, int, int]:
        width, section = longest or self.data.max_tokens, self.dpo
        together = 2 if section.has_pairs else 1
        rows = max(together, section.microbatch_tokens // width)
        return min(together * -(-section.batch // ranks), rows // together * together), width, width - 1
