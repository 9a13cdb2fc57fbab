"""CLAFusion: fuse trained networks of different depth and width into one.

The main path: `fuse(models, batches)` -> `Fusion.model`. The modules, in the order of that path:
`structure` (what a network is made of), `layer_costs` and `alignment` (which layers correspond), `balance` and
`merging` (equal depth), `maps` and `transport` (which neurons correspond), `combination` (the average), `correction`
(what averaging took away is given back).
"""

from clafusion import networks
from clafusion.alignment import align
from clafusion.balance import insert_identities
from clafusion.combination import average
from clafusion.distillation import distillation_loss
from clafusion.ensemble import Ensemble
from clafusion.errors import FusionError
from clafusion.fusion import Fusion, fuse
from clafusion.layer_costs import layer_costs
from clafusion.layer_maps import align_layers
from clafusion.merging import merge_layers
from clafusion.options import FusionOptions
from clafusion.similarity import cca, linear_cka
from clafusion.storage import describe, load_network, restore, save_network
from clafusion.structure import Structure, trace
from clafusion.transfer import map_units, transfer
from clafusion.transport import transport_map

__all__ = [
    "Ensemble",
    "Fusion",
    "FusionError",
    "FusionOptions",
    "Structure",
    "align",
    "align_layers",
    "average",
    "cca",
    "describe",
    "distillation_loss",
    "fuse",
    "insert_identities",
    "layer_costs",
    "linear_cka",
    "load_network",
    "map_units",
    "merge_layers",
    "networks",
    "restore",
    "save_network",
    "trace",
    "transfer",
    "transport_map",
]
