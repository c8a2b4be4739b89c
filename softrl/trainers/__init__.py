"""Trainers on top of TRL; a `<name>_config.py` beside each `<name>_trainer.py`."""

from softrl.trainers.evaluation import evaluate_policy
from softrl.trainers.gan_config import ReinforceGANConfig, TextGANConfig
from softrl.trainers.gan_trainer import ReinforceGANTrainer, TextGANTrainer
from softrl.trainers.gradient_statistics import GradientStatisticsCallback
from softrl.trainers.listwise_config import ListwisePreferenceConfig
from softrl.trainers.listwise_trainer import ListwisePreferenceTrainer
from softrl.trainers.ppo_config import PPOConfig
from softrl.trainers.ppo_trainer import PPOTrainer
from softrl.trainers.quietstar_config import QuietSTaRConfig
from softrl.trainers.quietstar_trainer import QuietSTaRTrainer
from softrl.trainers.reasoner_config import ReasonerTrainingConfig
from softrl.trainers.reasoner_trainer import ReasonerTrainer
from softrl.trainers.reinforce_config import ReinforceConfig
from softrl.trainers.reinforce_trainer import ReinforceTrainer
from softrl.trainers.rollout_config import RolloutConfig
from softrl.trainers.rollout_trainer import RolloutTrainer
from softrl.trainers.soft_ar_config import SoftARTrainingConfig
from softrl.trainers.soft_ar_trainer import SoftARTrainer
from softrl.trainers.soft_rollout_config import SoftRolloutConfig
from softrl.trainers.soft_rollout_trainer import SoftRolloutTrainer
from softrl.trainers.soft_sft_config import SoftSFTConfig
from softrl.trainers.soft_sft_trainer import SoftSFTTrainer

__all__ = [
    "GradientStatisticsCallback",
    "ListwisePreferenceConfig",
    "ListwisePreferenceTrainer",
    "PPOConfig",
    "PPOTrainer",
    "QuietSTaRConfig",
    "QuietSTaRTrainer",
    "ReasonerTrainer",
    "ReasonerTrainingConfig",
    "ReinforceConfig",
    "ReinforceGANConfig",
    "ReinforceGANTrainer",
    "ReinforceTrainer",
    "RolloutConfig",
    "RolloutTrainer",
    "SoftARTrainer",
    "SoftARTrainingConfig",
    "SoftRolloutConfig",
    "SoftRolloutTrainer",
    "SoftSFTConfig",
    "SoftSFTTrainer",
    "TextGANConfig",
    "TextGANTrainer",
    "evaluate_policy",
]
