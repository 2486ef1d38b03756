"""Figures as PNG files: of a run, and of what its network sees.

Each function draws numbers that it is given; ``flax_resnet.inspection`` computes them.
"""

from flax_resnet.figures.canvas import failure_as_one_line as failure_as_one_line
from flax_resnet.figures.pictures import attention as attention
from flax_resnet.figures.pictures import examples as examples
from flax_resnet.figures.pictures import filters as filters
from flax_resnet.figures.pictures import maps as maps
from flax_resnet.figures.pictures import rows as rows
from flax_resnet.figures.pictures import scatter as scatter
from flax_resnet.figures.runs import confusion as confusion
from flax_resnet.figures.runs import curves as curves
from flax_resnet.figures.runs import learning_rates as learning_rates
from flax_resnet.figures.runs import reliability as reliability
