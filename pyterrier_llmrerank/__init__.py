"""RankLLaMA and Matroyshka rerankers as PyTerrier transformers."""

__version__ = "0.1.0"

from .errors import ScoringError
from .matroyshka import MatroyshkaReranker
from .rankllama import RankLLaMAReranker
from .reranker import LLMReranker
from .tuning import Tuning, tune

__all__ = ["LLMReranker", "MatroyshkaReranker", "RankLLaMAReranker", "ScoringError", "Tuning", "tune"]
