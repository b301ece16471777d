"""The block `serve` of a recipe: the targets that serve the champion; they get it in this order."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, field_validator

from lewis.recipe.block import Block

_NAME = r"^[a-z0-9]+(-[a-z0-9]+)*$"
URL = r"^https?://[^\s/?#@]+(/[^\s?#]*)?$"  # no user, password or query: recipes are no place for secrets


class Target(Block):
    """A target of `serve`: a server, program or webhook that puts the champion into service.

    Attributes:
        kind: the kind of target, a key of `TARGETS`.
        name: name of the target, for `lewis served`; by default its kind.
    """

    kind: str
    name: str = Field(default="", pattern=rf"^$|{_NAME}", max_length=40)

    @property
    def label(self) -> str:
        """The name of the target, for people."""
        return self.name or self.kind

    @property
    def form(self) -> str:
        """The way in which the target is served, which selects the code: its kind, or one of the ways of its kind."""
        return self.kind


class Check(Block):
    """The check of a server before it gets traffic: it must answer as the scored model answered in its evaluation.

    Attributes:
        documents: how many documents are asked about, at most those that an evaluation keeps.
        agree: the mean share of the answers, up to their first difference, that has to be the same.
        likelihoods: whether log-likelihoods of choices are compared too; the server has to return those of a prompt.
        tolerance: nats per token by which log-likelihoods may differ.
    """

    documents: int = Field(default=32, ge=1)
    agree: float = Field(default=0.6, gt=0, le=1)
    likelihoods: bool = False
    tolerance: float = Field(default=0.15, gt=0)


class WebhookTarget(Target):
    """A receiver that gets a signed POST, in the form of MLflow's webhooks.

    Attributes:
        url: the receiver's URL.
        timeout_seconds: time limit of one attempt.
    """

    kind: Literal["webhook"]
    url: str = Field(pattern=URL)
    timeout_seconds: float = Field(default=30, gt=0, le=600)


class CommandTarget(Target):
    """A program on the worker's machine, which gets the facts about the model in environment variables.

    Attributes:
        run: name of the program in the folder `LEWIS_SERVE_PROGRAMS`, then its arguments; no shell reads them.
        timeout_minutes: how long the program may take.
    """

    kind: Literal["command"]
    run: tuple[str, ...] = Field(min_length=1)
    timeout_minutes: float = Field(default=60, gt=0)

    def _contradictions(self) -> Iterator[str]:
        if not re.fullmatch(r"\w[\w.-]*", name := self.run[0], re.ASCII):
            yield f"run: expected the name of a program in LEWIS_SERVE_PROGRAMS, without a path, got {name!r}"


class VllmTarget(Target):
    """A running vLLM server that loads the adapter.

    Attributes:
        url: URL of the server, without /v1.
        alias: the model name that clients ask for; by default that of the registered model.
        timeout_seconds: time limit for loading one adapter.
        check: the check that must pass before clients get the adapter; None: no check.
    """

    kind: Literal["vllm"]
    url: str = Field(pattern=URL)
    alias: str = Field(default="", pattern=r"^[^/\s]*$", max_length=200)
    timeout_seconds: float = Field(default=300, gt=0)
    check: Check | None = Check()


class OpenaiTarget(Target):
    """A server that takes the model by an HTTP call.

    Attributes:
        url: URL of the call.
        method: HTTP method of the call.
        body: sent as JSON, with the facts about the model in place of `{path}`, `{served_as}`, `{version}`, ...
        content_type: content type of the body, such as application/merge-patch+json.
        expect: key -> value that the JSON of the answer must have.
        api: URL of the server's OpenAI API, with /v1; empty: the API is not used.
        model: the model's name in this API, a template like `body`.
        timeout_seconds: time limit of the call.
        check: the check that must pass after the call, if there is an `api`; None: no check.
    """

    kind: Literal["openai"]
    url: str = Field(pattern=URL)
    method: Literal["post", "put", "patch"] = "post"
    body: dict[str, Any] = Field(min_length=1)
    content_type: str = Field(default="application/json", pattern=r"^[\w.+-]+/[\w.+-]+$")
    expect: dict[str, bool | int | float | str] = Field(default_factory=dict)
    api: str = Field(default="", pattern=rf"^$|{URL}")
    model: str = Field(default="{served_as}", min_length=1)
    timeout_seconds: float = Field(default=600, gt=0)
    check: Check | None = Check()


_OF_SERVER = 'haproxy_server_http_responses_total{proxy="{backend}",server="{server}"'
_BUSY = 'haproxy_server_current_sessions{proxy="{backend}",server="{server}"}'


class Rule(Block):
    """A limit for the new server: a Prometheus query, whose value may be at most `times` the old server's plus `plus`.

    Attributes:
        name: name of the rule, in messages and pictures.
        query: PromQL that gives one number. `{server}`, `{backend}` and `{window}` are filled in.
        times: factor of the old server's value over the same time.
        plus: number that is added to the product.
    """

    name: str = Field(min_length=1)
    query: str = Field(min_length=1)
    times: float = Field(default=1.0, ge=0)
    plus: float = Field(default=0.0, ge=0)


_RULES = (
    Rule(
        name="share of errors",
        query=f'sum(increase({_OF_SERVER},code="5xx"}}[{{window}}])) / sum(increase({_OF_SERVER}}}[{{window}}]))',
        plus=0.01,
    ),
    Rule(
        name="seconds per request",
        # By Little's law, since HAProxy's own mean is over its last 1024 requests, however old they are.
        query=f"sum(avg_over_time({_BUSY}[{{window}}])) / sum(rate({_OF_SERVER}}}[{{window}}]))",
        times=1.5,
        plus=0.2,
    ),
)


class CanaryTarget(Target):
    """A target with two servers, between which the traffic moves step by step to the new version (a canary).

    Attributes:
        prometheus: URL of the Prometheus that has the metrics of both servers.
        check: as for `vllm`.
        steps: percentages of the requests that the new version gets, one after the other, before it gets all.
        minutes: the shortest duration of a step.
        requests: how many requests the new version must have had in a step, by `count`, before it is judged.
        patience_minutes: the longest duration of a step; after that the old version gets all traffic again.
        count: PromQL of the number of requests, with the same placeholders as in a rule.
        rules: the limits that must hold at the end of each step.
    """

    prometheus: str = Field(pattern=URL)
    check: Check | None = Check()
    steps: tuple[Annotated[int, Field(ge=1, le=99)], ...] = (10, 50)
    minutes: float = Field(default=5, gt=0)
    requests: int = Field(default=50, ge=1)
    patience_minutes: float = Field(default=1440, gt=0)
    count: str = Field(min_length=1)
    rules: tuple[Rule, ...] = Field(min_length=1)

    def _contradictions(self) -> Iterator[str]:
        if list(self.steps) != sorted(set(self.steps)):
            yield f"steps: expected percentages that grow from step to step, got {list(self.steps)}"
        name, count = Counter(rule.name for rule in self.rules).most_common(1)[0]
        if count > 1:
            yield f"rules: {count} rules are called {name!r}; give each a `name` of its own"

    @property
    def places(self) -> dict[str, str]:
        """The values of the placeholders in queries, except `{server}` and `{window}`."""
        raise NotImplementedError


class HaproxyTarget(CanaryTarget):
    """Two vLLM servers behind HAProxy.

    Attributes:
        socket: path of HAProxy's runtime socket, with the level `admin`.
        backend: name of the HAProxy backend that has the two servers.
        servers: name of a server in HAProxy -> its URL without /v1.
        alias, timeout_seconds: as for `vllm`.
    """

    kind: Literal["haproxy"]
    socket: str = Field(pattern=r"^/")
    backend: str = Field(pattern=r"^[\w.:-]+$")
    servers: dict[Annotated[str, Field(pattern=r"^[\w.:-]+$")], Annotated[str, Field(pattern=URL)]] = Field(
        min_length=2, max_length=2
    )
    alias: str = Field(default="", pattern=r"^[^/\s]*$", max_length=200)
    timeout_seconds: float = Field(default=300, gt=0)
    count: str = Field(default=f"sum(increase({_OF_SERVER}}}[{{window}}]))", min_length=1)
    rules: tuple[Rule, ...] = Field(default=_RULES, min_length=1)

    def _contradictions(self) -> Iterator[str]:
        yield from super()._contradictions()
        one, other = (url.rstrip("/") for url in self.servers.values())
        if one == other:
            yield f"servers: expected two servers, between which the traffic moves, got {one!r} twice"

    @property
    def places(self) -> dict[str, str]:
        return {"backend": self.backend}


_OF_VLLM = 'namespace="{namespace}",{label}="{server}"'
_ANSWERS = f"sum(increase(vllm:request_success_total{{{_OF_VLLM}}}[{{window}}]))"


def _share_of(reason: str) -> str:
    """PromQL for the share of answers that ended for a given reason."""
    return (
        f'sum(increase(vllm:request_success_total{{{_OF_VLLM},finished_reason=~"{reason}"}}[{{window}}])) / {_ANSWERS}'
    )


_RULES_OF_VLLM = (
    Rule(name="share of errors", query=_share_of("abort|error"), plus=0.01),
    Rule(
        name="seconds to the first token, of 95 %",
        query="histogram_quantile(0.95, sum by (le) "
        f"(rate(vllm:time_to_first_token_seconds_bucket{{{_OF_VLLM}}}[{{window}}])))",
        times=1.5,
        plus=0.2,
    ),
    Rule(name="share of answers that were cut", query=_share_of("length"), plus=0.1),
)
_KUBERNETES_NAME = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?$", max_length=63)]


class KserveTarget(CanaryTarget):
    """One InferenceService of KServe on Knative, or two LLMInferenceServices in one routing group.

    Attributes:
        api: URL of the Kubernetes API.
        namespace: Kubernetes namespace of the services.
        services: the name of an InferenceService, or the names of both LLMInferenceServices.
        uri: where KServe gets the model's files, a template like `body` of `openai`, without `{output}`, `{previous}`.
        alias: the model name that clients ask for: for an adapter, by default that of the registered model; for an
            InferenceService, by default its name.
        gateway: URL of the gateway, for the check of an LLMInferenceService; empty: no check.
        path: path of the OpenAI API of an InferenceService, for its check.
        start_minutes: how long a service may take to stop, and how long to start.
    """

    kind: Literal["kserve"]
    api: str = Field(default="https://kubernetes.default.svc", pattern=URL)
    namespace: _KUBERNETES_NAME
    services: tuple[_KUBERNETES_NAME, ...] = Field(min_length=1, max_length=2)
    uri: str = Field(pattern=r"^[a-z0-9]+://\S+$")
    alias: str = Field(default="", pattern=r"^[^/\s]*$", max_length=200)
    gateway: str = Field(default="", pattern=rf"^$|{URL}")
    path: str = Field(default="/openai/v1", pattern=r"^/\S+$")
    start_minutes: float = Field(default=60, gt=0)
    count: str = Field(default=_ANSWERS, min_length=1)
    rules: tuple[Rule, ...] = Field(default=_RULES_OF_VLLM, min_length=1)

    @field_validator("services", mode="before")
    @classmethod
    def _as_tuple(cls, services: Any) -> Any:
        return (services,) if isinstance(services, str) else services

    def _contradictions(self) -> Iterator[str]:
        yield from super()._contradictions()
        if len(set(self.services)) < len(self.services):
            name = self.services[0]
            yield f"services: expected two services, between which the traffic moves, got {name!r} twice"
        if not any(name in self.uri for name in ("{path}", "{served_as}", "{version}", "{digest}")):
            yield "uri: expected a URI that differs from version to version: one with {served_as}, for example"
        if found := [name for name in ("{output}", "{previous}") if name in self.uri]:
            yield f"uri: expected a URI that a version always has, got {found[0]}, which no record keeps"

    @property
    def form(self) -> str:
        return "kserve" if len(self.services) == 2 else "inference service"

    @property
    def places(self) -> dict[str, str]:
        label = "llm_isvc_name" if len(self.services) == 2 else "serving_knative_dev_revision"
        return {"namespace": self.namespace, "label": label}


TARGETS: Mapping[str, type[Target]] = {
    "webhook": WebhookTarget,
    "command": CommandTarget,
    "vllm": VllmTarget,
    "openai": OpenaiTarget,
    "haproxy": HaproxyTarget,
    "kserve": KserveTarget,
}
"""Kind of target -> the class of its block."""


def _as_list(value: Any) -> Any:
    return [] if value is None else [value] if isinstance(value, Mapping) else value


def _check_names(targets: tuple[Target, ...]) -> tuple[Target, ...]:
    for label, count in Counter(each.label for each in targets).items():
        if count > 1:
            raise ValueError(f"{count} targets are called {label!r}; give each a `name` of its own")
        if label in ("hub", "local"):
            raise ValueError(f"{label!r} is the name of a target of LEWIS itself; give this one another `name`")
    return targets


Serve = Annotated[
    tuple[
        Annotated[
            WebhookTarget | CommandTarget | VllmTarget | OpenaiTarget | HaproxyTarget | KserveTarget,
            Discriminator("kind"),
        ],
        ...,
    ],
    BeforeValidator(_as_list),
    AfterValidator(_check_names),
]
"""Type of the block `serve`: one target or a list of targets."""
