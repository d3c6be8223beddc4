"""What holds for every test: no network, repeatable hypothesis runs, few threads."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")

from hypothesis import HealthCheck, settings

# Tensor work on shared cores has no steady pace: no deadline. Derandomised: a red run is red again.
settings.register_profile(
    "twinmerge", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.load_profile("twinmerge")
