"""Features of parts of a sample: what a network of pictures says of frames, or of patches."""

from __future__ import annotations

from genscale.metrics.features import FeatureNetwork


class PartFeatures(FeatureNetwork):
    """A network of pictures that is shown parts of samples.

    Args:
        network: reads each part.
        name: word in metric names and protocols.
    """

    def __init__(self, network: FeatureNetwork, name: str) -> None:
        super().__init__()
        self.network = network
        self.name = name
        self.tap = network.tap
        self.taps = network.taps
        self.resize = network.resize
        self.learns_from_labels = network.learns_from_labels

    @property
    def sha256(self) -> str:
        """Digest of the network."""
        return self.network.sha256

    def check(self) -> list[str]:
        """Return what the network complains of."""
        return self.network.check()

    def prepare(self) -> None:
        """Read the network's weights."""
        self.network.prepare()
