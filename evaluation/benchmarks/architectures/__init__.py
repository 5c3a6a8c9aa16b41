"""Networks on which structure discovery is proved: one entry per way that units are wired.

``OWN`` holds networks written here, ``TRANSFORMERS`` models of the ``transformers`` package. An
entry, when called, builds the network in eval mode together with example inputs. Sizes of different
roles differ wherever they can, so that two axes are never confused for being equally long.
"""

from evaluation.benchmarks.architectures.foreign import TRANSFORMERS, bert_base
from evaluation.benchmarks.architectures.own import OWN, resnet18
from evaluation.benchmarks.architectures.sample import Sample

__all__ = ["OWN", "TRANSFORMERS", "Sample", "bert_base", "resnet18"]
