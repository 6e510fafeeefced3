"""RankLLaMA and Matroyshka re-rankers as PyTerrier transformers."""

from .matroyshka import MatroyshkaReranker
from .rankllama import RankLLaMAReranker
from .reranker import ScoringError

__all__ = ["MatroyshkaReranker", "RankLLaMAReranker", "ScoringError"]
__version__ = "0.1.0"
