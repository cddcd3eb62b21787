"""The numbers of the Dual False Corrector."""

from dataclasses import dataclass


@dataclass(frozen=True)
class FalseCorrectorConfig:
    """
    The corrector's numbers; the defaults are those of the authors' code for breast ultrasound.

    Args:
        samples: N, the samples of each mask.
        click_radius: M; clicks are drawn from a disc of the object's shorter side divided by M.
        foreground: the mask is where the samples' mean exceeds this share of its largest value.
        suspicion: a pixel is suspicious if its uncertainty lies above this share of the way from the mask's smallest
            to its largest.
        brightness: suspicious pixels are of the object if they are less than this times as bright as it is on average.
        box_jitter: the share of a box's width or height by which each of its sides moves at most, inward or outward;
            ours, as the authors have clicks alone.

    Raises:
        ValueError: a number without a meaning.
    """

    samples: int = 5
    click_radius: float = 5.0
    foreground: float = 0.5
    suspicion: float = 0.9
    brightness: float = 1.4
    box_jitter: float = 0.1

    def __post_init__(self) -> None:
        good = {
            "samples of at least 1": self.samples >= 1,
            "click_radius of at least 1": self.click_radius >= 1,
            "foreground in [0, 1)": 0 <= self.foreground < 1,
            "suspicion in [0, 1]": 0 <= self.suspicion <= 1,
            "brightness above 0": self.brightness > 0,
            "box_jitter in [0, 0.5)": 0 <= self.box_jitter < 0.5,
        }
        for expected, holds in good.items():
            if not holds:
                got = getattr(self, expected.split()[0])
                raise ValueError(f"Expected {expected}, got {got}: see FalseCorrectorConfig.")
