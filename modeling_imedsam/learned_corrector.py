"""The learned corrector of false regions: two small heads that look at the suspicious places of a mask again."""

import torch
from torch import Tensor, nn

from imedsam.configuration.configuration_sf_recsam import SFRecSamConfig
from imedsam.false_corrector import suspicious_places
from imedsam.layers import HiddenLinear, ZeroLinear
from imedsam.uncertainty import ProbabilitySamples


class LearnedCorrector(nn.Module):
    """
    After a review of SF-RecSAM, which names two correctors, of false positives and of false negatives, trained in a
    second stage on places of high uncertainty; their form is ours. Each is an MLP on what SAM's decoder knows of a
    place and on what several decodings say of it. One moves the logits of suspicious places inside the mask, the other
    those outside of it; all other places stay as they are, and with a new corrector those too.
    """

    def __init__(self, config: SFRecSamConfig):
        super().__init__()
        self.suspicion, channels = config.corrector_suspicion, config.sam_config.mask_decoder_config.hidden_size // 8
        self.false_positive, self.false_negative = (
            nn.Sequential(HiddenLinear(channels + 3, channels), nn.ReLU(), ZeroLinear(channels, 1)) for _ in range(2)
        )

    def forward(self, logits: Tensor, features: Tensor, samples: Tensor, inside: Tensor) -> Tensor:
        """
        Args:
            logits: (R, 1, H, W), of R masks.
            features: (R, C, H, W), of the decoder.
            samples: (N, R, 1, H, W), probabilities of N decodings of each.
            inside: (R, 1, H, W), bool, where the image is; nothing outside is suspicious.

        Returns:
            Logits, (R, 1, H, W).
        """
        statistics = ProbabilitySamples(samples.float())
        entropy = statistics.entropy
        seen = [features, logits, statistics.mean, entropy]
        places = torch.cat([values.to(features.dtype) for values in seen], dim=1).movedim(1, -1)
        heads = (self.false_positive, self.false_negative)
        of_the_mask, of_the_rest = (head(places).movedim(-1, 1) for head in heads)
        certain = entropy.masked_fill(~inside, torch.inf).amin(dim=(-2, -1), keepdim=True)
        suspicious = suspicious_places(torch.where(inside, entropy, certain), self.suspicion)
        return logits + suspicious * torch.where(logits > 0, -of_the_mask, of_the_rest)
