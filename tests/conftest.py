import os


# The tests never reach for the Hub; read by huggingface_hub when it is imported, so set before anything else.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import torch  # noqa: E402


# Tiny models spend more time handing work between threads than computing.
torch.set_num_threads(1)
