"""The environment of a process that evaluates: what the libraries need, and no secrets."""

import os
from collections.abc import Mapping

from lewis import settings

_NAMES = (
    *("PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LANGUAGE", "TZ", "TMPDIR", "TEMP", "TMP", "VIRTUAL_ENV"),
    *("LD_LIBRARY_PATH", "LD_PRELOAD", settings.HOME.name, "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE"),
    *("CURL_CA_BUNDLE", "HF_HOME", "HF_HUB_CACHE", "HF_XET_CACHE", "HF_ASSETS_CACHE", "HF_MODULES_CACHE"),
    *("HF_DATASETS_CACHE", "HUGGINGFACE_HUB_CACHE", "TRANSFORMERS_CACHE", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"),
    *("HF_EVALUATE_OFFLINE", "TRANSFORMERS_OFFLINE", "TRANSFORMERS_VERBOSITY", "HF_HUB_DISABLE_PROGRESS_BARS"),
    *("HF_HUB_DISABLE_XET", "HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT"),
)
_PREFIXES = (
    *("LC_", "XDG_", "PYTHON", "COV_", "COVERAGE_", "OMP_", "KMP_", "MKL_", "OPENBLAS_", "NUMEXPR_", "NUMBA_", "GOMP_"),
    *("TORCH_", "TORCHINDUCTOR_", "PYTORCH_", "TRITON_", "CUDA_", "CUBLAS_", "CUDNN_", "NCCL_", "NVIDIA_", "ROCR_"),
    *("HIP_", "HSA_", "MALLOC_", "VLLM_", "SGLANG_", "FLASHINFER_"),
)
_SECRET = ("_KEY", "_TOKEN", "_SECRET", "_PASSWORD")
_WAY_TO_THE_HUB = (  # URLs, which may hold a password
    *("HF_ENDPOINT", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"),
    *("NO_PROXY", "no_proxy"),
)

FIXED = {
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_TOKEN_PATH": os.devnull,  # else the libraries read the token that is saved in HF_HOME
    "DO_NOT_TRACK": "1",
    "DISABLE_MULTIPROC": "1",  # else lm-eval's bootstrap forks one worker per core
    "PYTHONUNBUFFERED": "1",
    "PYTHONFAULTHANDLER": "1",
}


def without_secrets(environment: Mapping[str, str]) -> dict[str, str]:
    """What an evaluation needs of a worker's environment. Variables that are not known to be harmless are left out."""
    known = {name: value for name, value in environment.items() if name in _NAMES or name.startswith(_PREFIXES)}
    return {name: value for name, value in known.items() if not name.endswith(_SECRET)} | FIXED


def way_to_the_hub(environment: Mapping[str, str]) -> dict[str, str]:
    """What reading documents from the Hub takes besides: its address and the proxies."""
    return {name: environment[name] for name in _WAY_TO_THE_HUB if name in environment}
