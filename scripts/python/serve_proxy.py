"""Serves LiteLLM's proxy on a free port of the loopback, until its stdin is closed: serve_proxy.py CONFIG

Says "listening on PORT" when it answers.
"""

import os
import socket
import sys
import threading

# Prices come from the package, and nothing from a .env: it asks nobody but the models of the configuration.
os.environ.update(LITELLM_LOCAL_MODEL_COST_MAP="True", LITELLM_MODE="PRODUCTION", CONFIG_FILE_PATH=sys.argv[1])

import uvicorn  # noqa: E402
from litellm.proxy.proxy_server import app  # noqa: E402


class Server(uvicorn.Server):
    async def startup(self, sockets=None):
        await super().startup(sockets)
        print(f"listening on {sockets[0].getsockname()[1]}", flush=True)


def end():
    sys.stdin.read()
    os._exit(0)


threading.Thread(target=end, daemon=True).start()
listener = socket.socket()
listener.bind(("127.0.0.1", 0))
Server(uvicorn.Config(app, log_level="warning", ws="none")).run([listener])
