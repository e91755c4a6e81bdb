# Written by scripts/generate.py from the files in this folder; do not edit.

from detente.methods.cagrad import CAGrad as CAGrad
from detente.methods.cdtt import CDTT as CDTT
from detente.methods.connection_strength import ConnectionStrength as ConnectionStrength
from detente.methods.dtp import DTP as DTP
from detente.methods.dwa import DWA as DWA
from detente.methods.edm import EDM as EDM
from detente.methods.gd import GD as GD
from detente.methods.gls import GLS as GLS
from detente.methods.loss_power import LossPower as LossPower
from detente.methods.mgda import MGDA as MGDA
from detente.methods.pcgrad import PCGrad as PCGrad
from detente.methods.rlw import RLW as RLW
from detente.methods.uw import UW as UW
from detente.methods.wpcgrad import WPCGrad as WPCGrad

__all__: list[str]
