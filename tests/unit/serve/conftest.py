"""A tiny model behind the application, and clients of it in this process."""

import socket
import threading

import openai
import pytest
import uvicorn
from starlette.testclient import TestClient
from tests.unit.runtime.helpers import byte_llama, byte_tokenizer

from pocketlm.serve.app import make_app
from pocketlm.serve.limits import Limits
from pocketlm.serve.service import Service

TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'refused' %}{{ raise_exception('no such role') }}"
    "{% endif %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}[assistant]"
)
LIMITS = Limits(concurrency=4, positions=200, queue=6, seconds=60.0, body_bytes=20_000, choices=4)
HOST = "http://localhost"


@pytest.fixture(scope="session")
def model():
    return byte_llama()


@pytest.fixture(scope="session")
def tokenizer():
    return byte_tokenizer(TEMPLATE)


@pytest.fixture(scope="session")
def service(model, tokenizer):
    service = Service(model, tokenizer, "tiny", LIMITS)
    yield service
    service.scheduler.close(0)


@pytest.fixture(scope="session")
def http(service):
    """Without its lifespan, which would close the service."""
    return TestClient(make_app(service), base_url=HOST, raise_server_exceptions=False)


@pytest.fixture(scope="session")
def client(http):
    """The clients' own library."""
    return openai.OpenAI(
        base_url=f"{HOST}/v1", api_key="none", http_client=http, max_retries=0, timeout=60
    )


@pytest.fixture
def address(model, tokenizer):
    """A real server on a port, for what only a connection can show."""
    service = Service(model, tokenizer, "tiny", LIMITS)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(make_app(service), log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", service
        server.should_exit = True
        thread.join(30)
    assert not service.scheduler.alive
