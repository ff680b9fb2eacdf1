"""Training: [`SugarTrainer`], its configuration and the structure loss."""

from .collator import SugarCollator
from .config import SugarTrainingConfig
from .contrastive import ContrastiveLoss
from .loss import StructureLoss
from .trainer import SugarTrainer


__all__ = ["ContrastiveLoss", "StructureLoss", "SugarCollator", "SugarTrainer", "SugarTrainingConfig"]
