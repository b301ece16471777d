"""Targets of the kind `webhook`: a signed POST that receivers can check in the same way as MLflow's webhooks.

The signature is `v1,` and the HMAC-SHA256, in base64, of `<delivery id>.<timestamp>.<body>` with the secret. A POST is
repeated until the receiver has answered with a status of 200 to 299: at least once, each time with the same id.
"""

import base64
import hashlib
import hmac
import json
import time
from datetime import UTC, datetime

from lewis.recipe.serve import WebhookTarget
from lewis.serving.model import Model
from lewis.serving.records import Served
from lewis.serving.requests_to import send
from lewis.store.secrets import SERVE_SECRET

ID, TIMESTAMP, SIGNATURE = "X-MLflow-Delivery-Id", "X-MLflow-Timestamp", "X-MLflow-Signature"


def put(target: WebhookTarget, model: Model, before: Served) -> str:
    """Send the signed POST that reports the model; return the name that the model is served under.

    Raises:
        TransientError, LewisError: as `send`.
    """
    data = {"name": model.name, "alias": "champion", "version": model.version, "uri": model.uri}
    data |= {"digest": model.digest, "path": str(model.folder), "output": model.output}
    event = {"entity": "model_version_alias", "action": "created", "timestamp": datetime.now(UTC).isoformat()}
    body = json.dumps({**event, "data": {**data, "served_as": model.alias, "previous": model.previous}})
    stamp = str(int(time.time()))
    headers = {
        "Content-Type": "application/json",
        ID: model.delivery,
        TIMESTAMP: stamp,
        SIGNATURE: sign(SERVE_SECRET.read(), model.delivery, stamp, body),
    }
    send("POST", target.url, data=body.encode(), headers=headers, timeout_s=target.timeout_seconds)
    return model.alias


def sign(secret: str, delivery: str, stamp: str, body: str) -> str:
    """Return the signature of a delivery, as the text at the top of this module describes it."""
    made = hmac.new(secret.encode(), f"{delivery}.{stamp}.{body}".encode(), hashlib.sha256).digest()
    return f"v1,{base64.b64encode(made).decode()}"
