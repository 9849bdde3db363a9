"""What a trained model is worth: scores by split, position and facet, at other lengths; what its layers do; how fast it runs."""

from .measure import inspect, score
from .scores import Scores, Tally, evaluate, slice_names
from .throughput import ThroughputConfig, measure_throughput

__all__ = ["Scores", "Tally", "ThroughputConfig", "evaluate", "inspect", "measure_throughput", "score", "slice_names"]
