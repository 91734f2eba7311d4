"""Serves a GGUF file through llama.cpp's own HTTP server (OpenAI's API), on the loopback only.

usage: serve_model.py MODEL.gguf PORT THREADS chat|vectors

Prints `listening on ADDRESS` when the model is loaded; ends on SIGTERM or SIGINT.
"""

import signal
import sys
import threading

import xllamacpp

SLOTS = 2  # requests answered at once; on two cores more of them gain nothing
CONTEXT_PER_SLOT = {"chat": 4096, "vectors": 512}
PROMPT_CACHE_MIB = 64  # llama.cpp's own default is 8 GB


def main():
    model, port, threads, what = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    params = xllamacpp.CommonParams()
    params.model.path = model
    params.hostnames = ["127.0.0.1"]
    params.port = port
    params.n_parallel = SLOTS
    params.n_ctx = SLOTS * CONTEXT_PER_SLOT[what]
    params.kv_unified = False
    params.cpuparams.n_threads = threads
    params.cpuparams_batch.n_threads = threads
    params.cache_ram_mib = PROMPT_CACHE_MIB
    params.endpoint_metrics = True
    params.fit_params = False
    params.verbosity = 1
    params.embedding = what == "vectors"

    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    server = xllamacpp.Server(params)
    print("listening on", server.listening_address, flush=True)
    stop.wait()
    del server


if __name__ == "__main__":
    main()
