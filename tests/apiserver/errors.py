"""What the server refuses with: metav1.Status (api-conventions, "Response Status Kind")."""

from __future__ import annotations

from typing import Any


class ApiError(Exception):
    """An answer that is no success."""

    def __init__(
        self,
        code: int,
        reason: str,
        message: str,
        *,
        details: dict[str, Any] | None = None,
        headers: dict[str, str] | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.headers = headers or {}
        self.status = {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": metadata or {},
            "status": "Failure",
            "message": message,
            "reason": reason,
            "code": code,
        }
        if details:
            self.status["details"] = details


def _about(resource: Any, name: str) -> dict[str, Any]:
    return {"name": name, "group": resource.group, "kind": resource.plural}


def not_found(resource: Any, name: str) -> ApiError:
    text = f'{resource.qualified} "{name}" not found'
    return ApiError(404, "NotFound", text, details=_about(resource, name))


def already_exists(resource: Any, name: str) -> ApiError:
    text = f'{resource.qualified} "{name}" already exists'
    return ApiError(409, "AlreadyExists", text, details=_about(resource, name))


def conflict(resource: Any, name: str, why: str) -> ApiError:
    text = f'Operation cannot be fulfilled on {resource.qualified} "{name}": {why}'
    return ApiError(409, "Conflict", text, details=_about(resource, name))


MODIFIED = "the object has been modified; please apply your changes to the latest version"


def invalid(resource: Any, name: str, causes: list[tuple[str, str, str]]) -> ApiError:
    """`causes`: field, reason (FieldValueInvalid, FieldValueRequired, ...), message."""
    text = "; ".join(f"{field}: {message}" for field, _, message in causes)
    details = _about(resource, name) | {
        "kind": resource.kind,
        "causes": [
            {"reason": reason, "message": message, "field": field}
            for field, reason, message in causes
        ],
    }
    message = f'{resource.kind} "{name}" is invalid: {text}'
    return ApiError(422, "Invalid", message, details=details)


def bad_request(message: str) -> ApiError:
    return ApiError(400, "BadRequest", message)


def expired(message: str, **more: Any) -> ApiError:
    """410 Gone (api-concepts, "410 Gone responses")."""
    return ApiError(410, "Expired", message, **more)
