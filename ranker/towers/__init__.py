"""Dense parts around the long-sequence blocks: DIN on the short history, towers, the losses of CTR and CTCVR."""

from ranker.towers.din import DIN
from ranker.towers.esmm import click_losses, esmm_loss, esmm_probabilities
from ranker.towers.tower import MLP, MMoE

__all__ = ["DIN", "MLP", "MMoE", "click_losses", "esmm_loss", "esmm_probabilities"]
