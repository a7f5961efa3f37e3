"""Calibration of merges on a few unlabelled inputs: block by block, in closed form, without gradients or labels."""

from lit_merge.evaluation.calibration.featcal import FeatCal
from lit_merge.evaluation.calibration.regmean import RegMeanPlusPlus
from lit_merge.evaluation.calibration.settings import Calibration

__all__ = ["Calibration", "FeatCal", "RegMeanPlusPlus"]
