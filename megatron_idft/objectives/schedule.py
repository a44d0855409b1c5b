"""The schedule of IDFT's lambda."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LambdaSchedule:
    """gamma_lambda over training (arXiv 2602.12222): 0 during the warm-up, linear over the ramp, then 1.

    An iteration number is the count of iterations completed before the step: the first step of training has number 0,
    a run resumed from a checkpoint of iteration n continues with n. So steps 0 .. warmup_iterations - 1 train DFT; step
    warmup_iterations + k of the ramp has lambda = k / ramp_iterations; from step warmup + ramp on, lambda is 1.
    """

    warmup_iterations: int
    ramp_iterations: int

    def __post_init__(self) -> None:
        for name in ("warmup_iterations", "ramp_iterations"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be >= 0 (0 turns it off), got {getattr(self, name)}")

    @classmethod
    def from_shares(cls, warmup_share: float, ramp_share: float, train_iterations: int) -> "LambdaSchedule":
        """Shares of training as absolute iterations; both ends of the ramp are rounded to the nearest iteration."""
        for name, share in (("warmup_share", warmup_share), ("ramp_share", ramp_share)):
            if not 0 <= share <= 1:
                raise ValueError(f"{name} must be a share of training in [0, 1], got {share}")
        if warmup_share + ramp_share > 1 + 1e-9:  # 0.7 + 0.3 and the like may exceed 1 by rounding
            raise ValueError(
                f"warmup_share + ramp_share must not exceed 1, or lambda never reaches 1; "
                f"got {warmup_share} + {ramp_share}"
            )
        if train_iterations <= 0:
            raise ValueError(f"train_iterations must be > 0, got {train_iterations}")
        ramp_start = round(warmup_share * train_iterations)
        ramp_end = round((warmup_share + ramp_share) * train_iterations)
        return cls(ramp_start, ramp_end - ramp_start)

    def value(self, iteration: int) -> float:
        """lambda of the step that follows `iteration` completed iterations."""
        done = iteration - self.warmup_iterations
        if done < 0:
            return 0.0
        return 1.0 if done >= self.ramp_iterations else done / self.ramp_iterations
