"""What `lego/__init__.py` hands on lazily, spelled out for type checkers, by topic as there."""

# models
from lego.model.transformer import StandardTransformer as StandardTransformer
from lego.model.transformer import DeepSupervisionTransformer as DeepSupervisionTransformer
from lego.model.transformer import BaseTransformer as BaseTransformer

# training
from lego.training.trainer import Trainer as Trainer
from lego.training.trainer import TrainingConfig as TrainingConfig
from lego.training.trainer import StageConfig as StageConfig
from lego.training.trainer import create_standard_config as create_standard_config
from lego.training.trainer import create_deep_supervision_config as create_deep_supervision_config
from lego.training.steps import StepOptions as StepOptions
from lego.training.steps import NonFiniteLossError as NonFiniteLossError

# mining
from lego.mining.thresholds import compute_confidence as compute_confidence
from lego.mining.thresholds import compute_confidence_threshold as compute_confidence_threshold
from lego.mining.hard_tokens import collect_hard_examples as collect_hard_examples
from lego.mining.hidden_states import HiddenStateStore as HiddenStateStore

# growing
from lego.growing.upper_layers import ASHEMConfig as ASHEMConfig
from lego.model.growth import grow_model as grow_model
from lego.model.growth import add_block as add_block
from lego.growing.upper_layers import create_hard_example_loader as create_hard_example_loader
from lego.growing.upper_layers import train_upper_layers as train_upper_layers
from lego.growing.upper_layers import evaluate_on_hard_examples as evaluate_on_hard_examples

# routing and cost
from lego.routing.decoder import RoutedDecoder as RoutedDecoder
from lego.model.cost import Ledger as Ledger

# files
from lego.model.checkpoint import save_model as save_model
from lego.model.checkpoint import load_model as load_model
from lego.model.checkpoint import load_routed as load_routed

__version__: str
