"""RankLLaMA and Matroyshka re-rankers as PyTerrier transformers."""

from .matroyshka import MatroyshkaReranker
from .rankllama import RankLLaMAReranker
from .reranker import LLMReranker, ScoringError

__all__ = ["LLMReranker", "MatroyshkaReranker", "RankLLaMAReranker", "ScoringError"]
__version__ = "0.1.0"
