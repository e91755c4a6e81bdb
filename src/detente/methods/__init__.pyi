# Written by scripts/generate.py from the files in this folder; do not edit.

from detente.methods.aligned_mtl import AlignedMTL as AlignedMTL
from detente.methods.auto_lambda import AutoLambda as AutoLambda
from detente.methods.cagrad import CAGrad as CAGrad
from detente.methods.cdtt import CDTT as CDTT
from detente.methods.config import ConFIG as ConFIG
from detente.methods.conicgrad import ConicGrad as ConicGrad
from detente.methods.connection_strength import ConnectionStrength as ConnectionStrength
from detente.methods.db_mtl import DBMTL as DBMTL
from detente.methods.dtp import DTP as DTP
from detente.methods.dualproj import DualProj as DualProj
from detente.methods.dwa import DWA as DWA
from detente.methods.edm import EDM as EDM
from detente.methods.excess_mtl import ExcessMTL as ExcessMTL
from detente.methods.fairgrad import FairGrad as FairGrad
from detente.methods.famo import FAMO as FAMO
from detente.methods.gd import GD as GD
from detente.methods.gdod import GDOD as GDOD
from detente.methods.gls import GLS as GLS
from detente.methods.graddrop import GradDrop as GradDrop
from detente.methods.gradnorm import GradNorm as GradNorm
from detente.methods.gradops import GradOPS as GradOPS
from detente.methods.gradvac import GradVac as GradVac
from detente.methods.imtl import IMTL as IMTL
from detente.methods.imtl_g import IMTLG as IMTLG
from detente.methods.imtl_l import IMTLL as IMTLL
from detente.methods.loss_power import LossPower as LossPower
from detente.methods.mgda import MGDA as MGDA
from detente.methods.moco import MoCo as MoCo
from detente.methods.modo import MoDo as MoDo
from detente.methods.nash_mtl import NashMTL as NashMTL
from detente.methods.pcgrad import PCGrad as PCGrad
from detente.methods.rlw import RLW as RLW
from detente.methods.sdmgrad import SDMGrad as SDMGrad
from detente.methods.si import SI as SI
from detente.methods.stch import STCH as STCH
from detente.methods.upgrad import UPGrad as UPGrad
from detente.methods.uw import UW as UW
from detente.methods.wpcgrad import WPCGrad as WPCGrad

__all__: list[str]
