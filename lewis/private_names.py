"""The names of other packages that LEWIS uses or replaces although their authors do not document them.

A name is in this table if it begins with an underscore, if LEWIS puts something else in its place, or if it is a table
or function that its package uses for itself. Such a name may change in any release, so no other module spells it:

    table = private_names.SOME_TABLE.get()

`deployments/UPSTREAM.md` has a report for the authors of each: a bug, or the request for a documented name.
`tests/lewis/test_private_names.py` fails when a name is gone, and when the bug is fixed in the installed version.
"""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from lewis.errors import LewisError


@dataclass(frozen=True)
class PrivateName:
    """An undocumented name of another package.

    Attributes:
        package: name of the distribution.
        name: dotted name, from the package to the object.
        versions: specifier set of the versions that LEWIS was tried with; for a workaround, of those with the bug.
        why: what LEWIS needs the name for.
        used_in: the module of LEWIS that uses it.
        upstream: title of its section in UPSTREAM.md.
    """

    package: str
    name: str
    versions: str
    why: str
    used_in: str
    upstream: str

    def get(self) -> Any:
        """Return the object that has this name.

        Raises:
            LewisError: if it is gone; the message names the package, its version and the versions of this row.
        """
        owner, attribute = self._owner()
        return self.of(owner, attribute)

    def of(self, owner: Any, attribute: str = "") -> Any:
        """Return the attribute that has this name in another object, such as a subclass.

        Raises:
            LewisError: as `get`.
        """
        try:
            return getattr(owner, attribute or self.name.rpartition(".")[2])
        except AttributeError as error:
            raise self._gone() from error

    def put(self, value: Any) -> Any:
        """Put another object in this name's place, for the whole process; return the previous object.

        Raises:
            LewisError: as `get`.
        """
        owner, attribute = self._owner()
        before = self.of(owner, attribute)
        setattr(owner, attribute, value)
        return before

    @contextmanager
    def replaced(self, value: Any) -> Iterator[None]:
        """Replace the object that has this name during a block.

        Raises:
            LewisError: as `get`.
        """
        before = self.put(value)
        try:
            yield
        finally:
            self.put(before)

    def applies(self) -> bool:
        """Whether the installed version is one of `versions`."""
        from packaging.specifiers import SpecifierSet

        return SpecifierSet(self.versions).contains(version(self.package), prereleases=True)

    def _owner(self) -> tuple[Any, str]:
        """Return the object that has this name as an attribute, and the attribute's name."""
        path, _, attribute = self.name.rpartition(".")
        module, rest = path, list[str]()
        while module:
            try:
                owner = importlib.import_module(module)
                break
            except ModuleNotFoundError as error:
                if error.name is None or not (module == error.name or module.startswith(f"{error.name}.")):
                    raise
                module, _, last = module.rpartition(".")
                rest.insert(0, last)
        else:
            raise self._gone()
        for part in rest:
            owner = self.of(owner, part)
        return owner, attribute

    def _gone(self) -> LewisError:
        try:
            installed = f"{self.package} {version(self.package)}"
        except PackageNotFoundError:
            installed = f"no {self.package}"
        return LewisError(
            f"{self.name} is missing, which LEWIS needs to {self.why}: expected {self.package}{self.versions}, "
            f"{installed} is installed; install another version"
        )


# fmt: off
PREFECT_UI_V2 = PrivateName(
    "prefect", "prefect.__ui_v2_static_path__", ">=3.9,<4",
    "offer no page that calls a tracking host", "lewis_flows.service.prefect_app",
    "Prefect: the second UI asks a tracking host although analytics are off")
PREFECT_WRITE_EVENTS = PrivateName(
    "prefect", "prefect.server.events.services.event_persister.write_events", ">=3.9,<3.10",
    "keep events that arrive next to one that SQLite has already", "lewis_flows.service.prefect_app",
    "Prefect: on SQLite, events that are sent again make others be dropped")
PREFECT_LEASE_INDEX = PrivateName(
    "prefect", "prefect.server.concurrency.lease_storage.filesystem.ConcurrencyLeaseStorage._lock_expiration_index",
    ">=3.9,<4", "start a server again that was killed while it noted a lease", "lewis_flows.service.prefect_app",
    "Prefect: a server that was killed leaves a lock that its successor may wait for without end")
PREFECT_TASK_INPUTS = PrivateName(
    "prefect", "prefect.utilities.engine.collect_task_run_inputs_sync", ">=3.9,<4",
    "draw the edges between tasks that run in processes", "lewis_flows.runners.choose",
    "Prefect: ProcessPoolTaskRunner forgets which tasks the arguments came from")
PREFECT_ASSET_CONTEXT = PrivateName(
    "prefect", "prefect.context.AssetContext", ">=3.9,<4",
    "report the assets of a task that ends as Cached", "lewis_tasks.support.assets",
    "Prefect: a task that ends as Cached reports no assets")
PREFECT_RETRY = PrivateName(
    "prefect", "prefect.client.base.PrefectHttpxSyncClient._send_with_retry", ">=3.9,<4",
    "wait for a server that is started again", "lewis_tasks.support.patience",
    "Prefect: a run does not survive a server that is away for some minutes")
PREFECT_RETRY_ASYNC = PrivateName(
    "prefect", "prefect.client.base.PrefectHttpxAsyncClient._send_with_retry", ">=3.9,<4",
    "wait for a server that is started again", "lewis_tasks.support.patience",
    "Prefect: a run does not survive a server that is away for some minutes")
PREFECT_EVENTS_CLIENT = PrivateName(
    "prefect", "prefect.events.worker.EventsWorker.set_client_override", ">=3.9,<4",
    "keep the states of tasks while a server is started again", "lewis_tasks.support.patience",
    "Prefect: a run does not survive a server that is away for some minutes")
LM_EVAL_ENV = PrivateName(
    "lm_eval", "lm_eval.utils.env", ">=0.4.13,<0.5",
    "render the templates of tasks in a sandbox", "lewis.rehearsal.untrusted",
    "lm-eval: templates of tasks are rendered without a sandbox")
LM_EVAL_IMPORT_FUNCTION = PrivateName(
    "lm_eval", "lm_eval.tasks._yaml_loader._import_func_in_yml", ">=0.4.13,<0.5",
    "import no code of a task file without permission", "lewis.rehearsal.untrusted",
    "lm-eval: no way to refuse the code of a task file")
LM_EVAL_TASK = PrivateName(
    "lm_eval", "lm_eval.api.task.ConfigurableTask.__init__", ">=0.4.13,<0.5",
    "ask what a task is without the download of its documents", "lewis.rehearsal.no_rows",
    "lm-eval: no way to load a task without its documents")
LM_EVAL_ENVIRONMENT = PrivateName(
    "lm_eval", "lm_eval.evaluator.add_env_info", ">=0.4.13,<0.5",
    "save the seconds in which pip lists all packages", "lewis.rehearsal.untrusted",
    "lm-eval: every evaluation runs pip to list all packages")
LM_EVAL_TOKENS = PrivateName(
    "lm_eval", "lm_eval.api.model.TemplateLM._loglikelihood_tokens", ">=0.4.13,<0.5",
    "keep the windows of rolling log-likelihoods batch by batch", "lewis.evaluation.harness.kept_answers",
    "lm-eval: rolling log-likelihoods are kept only when all are done")
RESIZE_EMBEDDINGS = PrivateName(
    "transformers", "transformers.PreTrainedModel.resize_token_embeddings", ">=5.17,<6",
    "score an adapter on a base with more rows than tokens", "lewis.evaluation.harness.loaded_model",
    "lm-eval: the base of an adapter is cut to the number of tokens")
FROM_CONFIG = PrivateName(
    "transformers", "transformers.PreTrainedModel._from_config", ">=5.17,<6",
    "build the class that a config names, without weights", "lewis.models.network.network_class",
    "transformers: a class of a model has no `from_config`")
CONVERSIONS = PrivateName(
    "transformers", "transformers.conversion_mapping.get_model_conversion_mapping", ">=5.17,<6",
    "find the parameter that a tensor of a checkpoint belongs to", "lewis.models.network.placing",
    "transformers: which parameter a tensor of a checkpoint becomes")
WEIGHT_RENAMING = PrivateName(
    "transformers", "transformers.core_model_loading.WeightRenaming", ">=5.17,<6",
    "find the parameter that a tensor of a checkpoint belongs to", "lewis.models.network.placing",
    "transformers: which parameter a tensor of a checkpoint becomes")
RENAME_KEY = PrivateName(
    "transformers", "transformers.core_model_loading.rename_source_key", ">=5.17,<6",
    "find the parameter that a tensor of a checkpoint belongs to", "lewis.models.network.placing",
    "transformers: which parameter a tensor of a checkpoint becomes")
GGUF_ARCHITECTURES = PrivateName(
    "transformers", "transformers.modeling_gguf_pytorch_utils.GGUF_SUPPORTED_ARCHITECTURES", ">=5.17,<6",
    "know which GGUF files transformers reads", "lewis.models.gguf",
    "transformers: what is known of GGUF files is not documented")
GGUF_PROCESSORS = PrivateName(
    "transformers", "transformers.modeling_gguf_pytorch_utils.TENSOR_PROCESSORS", ">=5.17,<6",
    "undo what llama.cpp does to the values of a GGUF file", "lewis.models.gguf",
    "transformers: what is known of GGUF files is not documented")
GGUF_PROCESSOR = PrivateName(
    "transformers", "transformers.modeling_gguf_pytorch_utils.TensorProcessor", ">=5.17,<6",
    "undo what llama.cpp does to the values of a GGUF file", "lewis.models.gguf",
    "transformers: what is known of GGUF files is not documented")
GGUF_NAMES = PrivateName(
    "transformers", "transformers.modeling_gguf_pytorch_utils.get_gguf_hf_weights_map", ">=5.17,<6",
    "know the names of the tensors of a GGUF file", "lewis.models.gguf",
    "transformers: what is known of GGUF files is not documented")
CHAT_TEMPLATES = PrivateName(
    "transformers", "transformers.utils.chat_template_utils.render_jinja_template", ">=5.17,<6",
    "write chats by a template in a process without the tokenizer", "lewis.importance.chats",
    "transformers: where the answers of a chat are is given in tokens only")
CHAT_CLOCK = PrivateName(
    "transformers", "transformers.utils.chat_template_utils.datetime", ">=5.17,<6",
    "write the same chats on every day", "lewis.importance.chats",
    "transformers: a chat template writes the date of the day")
PIPELINE_TASK = PrivateName(
    "transformers", "transformers.pipelines.check_task", ">=5.17,<6",
    "let MLflow find the class of the pipeline", "lewis.registry.logged_model",
    "MLflow: saving a transformers model fails, as the pipeline has no __name__")
MLFLOW_FIND_APP = PrivateName(
    "mlflow", "mlflow.server._find_app", ">=3.17,<4",
    "look at who asks before MLflow does", "lewis_flows.service.mlflow_app",
    "MLflow: every page of the machine may change what a signed-in browser may")
MLFLOW_SQL_STORE = PrivateName(
    "mlflow", "mlflow.store.tracking.sqlalchemy_store.SqlAlchemyStore", ">=3.17,<4",
    "create a whole database before another process sees it", "lewis.registry.tracking",
    "MLflow: two processes that create one SQLite database break it")
MLFLOW_TRACES = PrivateName(
    "mlflow", "mlflow.tracing.client.TracingClient", ">=3.17,<4",
    "log traces in a fourth of the time: MLflow logs the span first, and then writes its trace twice",
    "lewis.registry.traces",
    "MLflow: a trace is written twice, since its spans are logged first")
MLFLOW_START_SERVER = PrivateName(
    "mlflow", "mlflow.server._exec_cmd", ">=3.17,<4",
    "save the 200 MB of a process that waits for the server", "lewis_flows.service.mlflow_app",
    "MLflow: `mlflow server` stays next to the server that it starts")
HUB_WITHOUT_XET = PrivateName(
    "huggingface_hub", "huggingface_hub.constants.HF_HUB_DISABLE_XET", ">=2.4,<3",
    "upload to a Hub that has no Xet", "lewis.models.hub.client",
    "huggingface_hub: an upload to a Hub without Xet fails")
HUB_GET = PrivateName(
    "huggingface_hub", "huggingface_hub.file_download.http_get", ">=2.4,<3",
    "go on with a download where it broke off", "lewis.models.hub.client",
    "huggingface_hub: a download that is cut begins again")
HUB_PIECE = PrivateName(
    "huggingface_hub", "huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", ">=2.4,<3",
    "keep what arrived before a download was cut", "lewis.models.hub.client",
    "huggingface_hub: a download that is cut begins again")
# fmt: on

ALL: tuple[PrivateName, ...] = tuple(each for each in list(vars().values()) if isinstance(each, PrivateName))
"""Every row, in the order of this file."""
