"""requests (extra `requests`) over a shared pool: one cap for the connections of all processes of the host.

    session.mount("https://api.example.com/", SharedPoolAdapter("api", max_connections=20))

The adapter is requests' own; its urllib3 managers are those of `sharedpool.integrations.urllib3`.
"""

from __future__ import annotations

from typing import Any

import requests
from requests.adapters import DEFAULT_POOLSIZE, DEFAULT_RETRIES, HTTPAdapter
from requests.exceptions import InvalidSchema
from urllib3.exceptions import PoolError

from .. import control
from ..pool import Pool as Handle
from .urllib3 import SharedPoolManager, SharedProxyManager


class SharedPoolAdapter(HTTPAdapter):
    """requests' HTTPAdapter whose connections all processes of the host share, under one cap.

    Args:
        pool: The shared pool's name.
        app: The scope's name.
        pool_connections: As for HTTPAdapter: how many of urllib3's pools are kept, one for each address.
        pool_maxsize: As for HTTPAdapter: how many connection objects each of them keeps; not the cap.
        max_retries: As for HTTPAdapter.
        pool_block: As for HTTPAdapter: at most pool_maxsize requests of this process at once to one address.
        **given: Options of sharedpool (`max_connections`, ...), which declare the pool.

    Making one does no I/O. It can be pickled, and so can its session. After a fork each process goes on by itself.

    Raises:
        OptionError: An option is wrong.
    """

    __attrs__ = [*HTTPAdapter.__attrs__, "_shared_name", "_shared_app", "_shared_given"]  # noqa: RUF012 - requests' way

    def __init__(
        self,
        pool: str = "default",
        *,
        app: str | None = None,
        pool_connections: int = DEFAULT_POOLSIZE,
        pool_maxsize: int = DEFAULT_POOLSIZE,
        max_retries: Any = DEFAULT_RETRIES,
        pool_block: bool = False,
        **given: Any,
    ) -> None:
        self._shared_name, self._shared_app, self._shared_given = pool, app, given
        super().__init__(pool_connections, pool_maxsize, max_retries, pool_block)

    def init_poolmanager(self, connections: int, maxsize: int, block: bool = False, **pool_kwargs: Any) -> None:
        """As HTTPAdapter's, over the shared pool."""
        self._pool_connections, self._pool_maxsize, self._pool_block = connections, maxsize, block
        self.shared_pool: Handle[Any] = control.attach(self._shared_name, app=self._shared_app, **self._shared_given)
        self.poolmanager = SharedPoolManager(
            self.shared_pool, num_pools=connections, maxsize=maxsize, block=block, **pool_kwargs
        )

    def proxy_manager_for(self, proxy: str, **proxy_kwargs: Any) -> Any:
        """As HTTPAdapter's, over the shared pool.

        Raises:
            requests.exceptions.InvalidSchema: It is a SOCKS proxy, whose connections no shared pool opens.
        """
        if proxy.lower().startswith("socks"):
            raise InvalidSchema("a SharedPoolAdapter opens no connections through SOCKS proxies")
        if proxy not in self.proxy_manager:
            self.proxy_manager[proxy] = SharedProxyManager(
                proxy, self.shared_pool, proxy_headers=self.proxy_headers(proxy), num_pools=self._pool_connections,
                maxsize=self._pool_maxsize, block=self._pool_block, **proxy_kwargs,
            )  # fmt: skip
        return self.proxy_manager[proxy]

    def send(self, request: requests.PreparedRequest, *args: Any, **kwargs: Any) -> requests.Response:
        """As HTTPAdapter's. That no connection became free in time is a ConnectionError, too."""
        try:
            return super().send(request, *args, **kwargs)
        except PoolError as error:
            raise requests.exceptions.ConnectionError(error, request=request) from error
