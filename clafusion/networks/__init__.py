"""The network families of the paper: `MLP`, `VGG`, `ResNet`, and the published networks by name.

`families` has the classes, `layers` what they share, `published` the table of names.
"""

from clafusion.networks.families import MLP, VGG, ResNet, build, published

__all__ = ["MLP", "VGG", "ResNet", "build", "published"]
