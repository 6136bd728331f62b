"""What stands before a module's layers and behind them: stems and heads."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PatchEmbedding:
    """Pixels to tokens: ``patch x patch`` pixels of ``channels``, ``temporal`` frames, one linear."""

    patch: int
    channels: int = 3
    temporal: int = 1

    def parameters(self, hidden: int) -> int:
        return self.patch**2 * self.channels * self.temporal * hidden


@dataclass(frozen=True)
class AudioEmbedding:
    """Mel spectrogram to tokens: two convolutions of width 3, the second with stride 2 (Whisper's stem)."""

    mels: int = 128

    def parameters(self, hidden: int) -> int:
        return 3 * self.mels * hidden + 3 * hidden**2


@dataclass(frozen=True)
class FeatureEmbedding:
    """Instances of any kind to tokens: ``features`` values a token, one linear."""

    features: int

    def parameters(self, hidden: int) -> int:
        return self.features * hidden


@dataclass(frozen=True)
class TokenEmbedding:
    """Token ids to hidden states: a table of ``vocabulary`` rows, split over the tensor-parallel ranks."""

    vocabulary: int

    def parameters(self, hidden: int) -> int:
        return self.vocabulary * hidden


@dataclass(frozen=True)
class LatentEmbedding:
    """Video latents to DiT tokens, with the timestep embedding and (adaLN ``single``) the shared modulation.

    An autoencoder outside the pipeline compresses (frames, height, width) by ``compression``; ``patch`` then groups the
    latents of ``channels`` channels. Defaults are MovieGen's (arXiv 2410.13720, section 3.1): 8x8x8, 16, 1x2x2.
    """

    channels: int = 16
    patch: tuple[int, int, int] = (1, 2, 2)
    compression: tuple[int, int, int] = (8, 8, 8)
    shared_modulation: bool = True

    def parameters(self, hidden: int) -> int:
        timestep = 256 * hidden + hidden**2
        return self.channels * _volume(self.patch) * hidden + timestep + 6 * hidden**2 * self.shared_modulation


@dataclass(frozen=True)
class Projector:
    """Two linears from an encoder's hidden states to the next module's width; ``reduction`` tokens become one."""

    output: int
    inner: int
    reduction: int = 1

    def parameters(self, hidden: int) -> int:
        return hidden * self.reduction * self.inner + self.inner * self.output


@dataclass(frozen=True)
class LanguageHead:
    """Output projection to ``vocabulary`` and the cross-entropy loss. ``tied``: it shares the embedding's table, of
    which a pipeline keeps a second copy on the last rank all the same."""

    vocabulary: int
    tied: bool = False

    def parameters(self, hidden: int) -> int:
        return self.vocabulary * hidden


@dataclass(frozen=True)
class LatentHead:
    """A DiT's last modulation, linear and mean squared error."""

    channels: int = 16
    patch: tuple[int, int, int] = (1, 2, 2)

    def parameters(self, hidden: int) -> int:
        return self.channels * _volume(self.patch) * hidden + 2 * hidden**2


@dataclass(frozen=True)
class Nothing:
    """No stem, or no head: hidden states go on as they are."""

    def parameters(self, hidden: int) -> int:
        return 0


Stem = PatchEmbedding | AudioEmbedding | FeatureEmbedding | TokenEmbedding | LatentEmbedding | Nothing
Head = Projector | LanguageHead | LatentHead | Nothing


def _volume(patch: tuple[int, int, int]) -> int:
    return patch[0] * patch[1] * patch[2]
