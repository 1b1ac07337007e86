"""What `make bench` measures: every figure beside its limit or its peer, in the same run."""

import os

# What the measured processes get. The service may set variables of gRPC when it is imported, which
# must not reach a server of another version, or one that is not ours.
ENVIRONMENT = dict(os.environ)

# The service of the empty method, which no proto has.
EMPTY_SERVICE = "chat_ticket.bench.Bench"
EMPTY_PATH = f"/{EMPTY_SERVICE}/Empty"
