"""Transparent resumption of Everline's output streams, for code that uses httpx or httpx2.

``OpenAI(http_client=everline.http_client())`` is all there is to do; ``everline.openai_client()``
does it for you.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, Optional

from ._policy import Options, StreamError
from ._transport import AsyncEverlineTransport, EverlineTransport

__all__ = [
    "AsyncEverlineTransport",
    "EverlineTransport",
    "Options",
    "StreamError",
    "anthropic_client",
    "async_anthropic_client",
    "async_http_client",
    "async_openai_client",
    "http_client",
    "openai_client",
]

#: What the SDKs allow a request by default, in seconds; connecting gets five.
_TIMEOUT = 600.0


def http_client(*, options: Optional[Options] = None, module: Optional[ModuleType] = None, **client: Any) -> Any:
    """An ``httpx.Client`` that resumes; with ``module=httpx2`` one of httpx2.

    Further arguments are the client's own; ``verify``, ``cert``, ``http2`` and ``proxy`` reach the
    transport.
    """
    module = module or _installed()
    return module.Client(**_client_arguments(module, EverlineTransport, options, client))


def async_http_client(
    *, options: Optional[Options] = None, module: Optional[ModuleType] = None, **client: Any
) -> Any:
    """An ``httpx.AsyncClient`` that resumes; with ``module=httpx2`` one of httpx2."""
    module = module or _installed()
    return module.AsyncClient(**_client_arguments(module, AsyncEverlineTransport, options, client))


def openai_client(*, options: Optional[Options] = None, **client: Any) -> Any:
    """An ``openai.OpenAI`` whose streams outlive replicas; arguments as of that class."""
    import openai

    return openai.OpenAI(http_client=http_client(options=options, module=_module_of(openai)), **client)


def async_openai_client(*, options: Optional[Options] = None, **client: Any) -> Any:
    """An ``openai.AsyncOpenAI`` whose streams outlive replicas."""
    import openai

    inner = async_http_client(options=options, module=_module_of(openai))
    return openai.AsyncOpenAI(http_client=inner, **client)


def anthropic_client(*, options: Optional[Options] = None, **client: Any) -> Any:
    """An ``anthropic.Anthropic`` whose streams outlive replicas."""
    import anthropic

    inner = http_client(options=options, module=_module_of(anthropic))
    return anthropic.Anthropic(http_client=inner, **client)


def async_anthropic_client(*, options: Optional[Options] = None, **client: Any) -> Any:
    """An ``anthropic.AsyncAnthropic`` whose streams outlive replicas."""
    import anthropic

    inner = async_http_client(options=options, module=_module_of(anthropic))
    return anthropic.AsyncAnthropic(http_client=inner, **client)


def _client_arguments(
    module: ModuleType, transport: Any, options: Optional[Options], client: dict[str, Any]
) -> dict[str, Any]:
    known = ("verify", "cert", "http1", "http2", "proxy", "trust_env", "limits")
    of_transport = {name: client.pop(name) for name in known if name in client}
    client.setdefault("timeout", module.Timeout(_TIMEOUT, connect=5.0))
    client.setdefault("follow_redirects", True)
    return {**client, "transport": transport(options=options, module=module, **of_transport)}


def _installed() -> ModuleType:
    try:
        import httpx
    except ImportError:
        import httpx2  # type: ignore[import-not-found, unused-ignore]

        other: ModuleType = httpx2
        return other
    return httpx


def _module_of(sdk: ModuleType) -> ModuleType:
    """httpx or httpx2: whichever an SDK's own errors are made with."""
    import sys

    base = sys.modules.get(f"{sdk.__name__}._base_client")
    found = getattr(base, "httpx2", None) or getattr(base, "httpx", None)
    return found if isinstance(found, ModuleType) else _installed()
