"""What `lego/__init__.py` hands on lazily, spelled out for type checkers."""

from lego.ashem import ASHEMConfig as ASHEMConfig
from lego.ashem import collect_hard_examples as collect_hard_examples
from lego.ashem import create_hard_example_loader as create_hard_example_loader
from lego.ashem import evaluate_on_hard_examples as evaluate_on_hard_examples
from lego.ashem import train_upper_layers as train_upper_layers
from lego.checkpoint import grow_model as grow_model
from lego.checkpoint import load_model as load_model
from lego.checkpoint import load_routed as load_routed
from lego.checkpoint import save_model as save_model
from lego.cost import Ledger as Ledger
from lego.exits import compute_confidence as compute_confidence
from lego.exits import compute_confidence_threshold as compute_confidence_threshold
from lego.hidden_states import HiddenStateStore as HiddenStateStore
from lego.routing import RoutedDecoder as RoutedDecoder
from lego.steps import NonFiniteLossError as NonFiniteLossError
from lego.steps import StepOptions as StepOptions
from lego.trainer import StageConfig as StageConfig
from lego.trainer import Trainer as Trainer
from lego.trainer import TrainingConfig as TrainingConfig
from lego.trainer import create_deep_supervision_config as create_deep_supervision_config
from lego.trainer import create_standard_config as create_standard_config
from lego.transformer import BaseTransformer as BaseTransformer
from lego.transformer import DeepSupervisionTransformer as DeepSupervisionTransformer
from lego.transformer import StandardTransformer as StandardTransformer

__version__: str
