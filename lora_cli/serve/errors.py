"""Errors as OpenAI's API tells them: a status, and what is wrong, of which parameter."""

from __future__ import annotations

from typing import Any

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    503: "overloaded_error",
    504: "timeout_error",
}


class ApiError(Exception):
    """A request that is not answered.

    `status`: HTTP's. `param`: the field it is about. `code`: a word for programs. `retry_after`:
    seconds after which to try again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.retry_after = retry_after

    def to_data(self) -> dict[str, Any]:
        """Return it as OpenAI's API writes it."""
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else TYPES[400])
        told = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": told}

    def list_headers(self) -> dict[str, str]:
        """Return the headers that belong to it."""
        made = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return made | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})


def refuse(message: str, param: str | None = None, code: str = "invalid_value") -> ApiError:
    """Return the error of a field that cannot be taken as it is."""
    return ApiError(400, message, code, param)
