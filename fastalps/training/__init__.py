"""Training: the paper's alternating optimisation of autoencoder and distorter.

`config` holds the options, `steps` one optimisation step of each player, `batches` the images on
their device, `validation` what picks the epoch, `run` what happens between epochs, `run_state` what
a run needs to go on, `trainer` the loop; `stacked` trains several models at once, as the one
network that `grouped` makes of them; `tensorboard` is a logger.
"""

from fastalps.training.config import TrainConfig
from fastalps.training.stacked import fit_stacked
from fastalps.training.tensorboard import TensorBoardLogger
from fastalps.training.trainer import FitResult, Trainer

__all__ = ["FitResult", "TensorBoardLogger", "TrainConfig", "Trainer", "fit_stacked"]
