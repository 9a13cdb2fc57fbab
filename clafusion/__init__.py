"""CLAFusion: fuse trained networks of different depth and width into one.

The main path: `fuse(models, batches)` -> `Fusion.model`; `fusion/fuse.py` tells it. The packages, in the order of that
path: `tracing` (what a network is made of), `statistics` (what is measured on samples), `alignment` (which layers
correspond), `balancing` (equal depth), `transport` (which neurons correspond), `fusion` (the average), and `correction`
(what averaging took away is given back).
"""

from clafusion import networks
from clafusion.alignment.dynamic_programming import align
from clafusion.alignment.layer_costs import layer_costs
from clafusion.alignment.layer_maps import align_layers
from clafusion.alignment.similarity import cca, linear_cka
from clafusion.balancing.insertion import insert_identities
from clafusion.balancing.merging import merge_layers
from clafusion.distillation import distillation_loss
from clafusion.ensemble import Ensemble
from clafusion.errors import FusionError
from clafusion.filter_transfer.transfer import map_units, transfer
from clafusion.formats.files import describe, load_network, restore, save_network
from clafusion.fusion.averaging import average
from clafusion.fusion.fuse import Fusion, fuse
from clafusion.loading import load_from
from clafusion.old_names import explain_old_names as _explain_old_names
from clafusion.options import FusionOptions
from clafusion.tracing.reading import trace
from clafusion.tracing.rules import register_operation
from clafusion.tracing.structure import Structure
from clafusion.transport.solvers import transport_map

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
    "load_from",
    "load_network",
    "map_units",
    "merge_layers",
    "networks",
    "register_operation",
    "restore",
    "save_network",
    "trace",
    "transfer",
    "transport_map",
]

__version__ = "0.1.0"
_explain_old_names()
