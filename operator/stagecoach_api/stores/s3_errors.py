"""What an S3 error means: worth another try, or which of the store's errors. botocore is not imported for it.

Messages are built from codes alone: a server's text may repeat request headers, and with them credentials.
"""

from __future__ import annotations

from stagecoach_api.names import ENV_CREDENTIALS_DIR
from stagecoach_api.stores.base import AccessDenied, Corrupt, NotFound, StoreError, Unreachable, public_endpoint

_TRANSIENT_STATUS = {408, 429, 500, 502, 503, 504}
_TRANSIENT_CODES = {
    "RequestTimeout",
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "InternalError",
    "BadDigest",  # the bytes were damaged on their way: the server's checksum says so
    "ConditionalRequestConflict",  # another conditional write of the key is under way; the next try is told 412
    "OperationAborted",
}
_TRANSIENT_ERRORS = {
    "ConnectionError",
    "EndpointConnectionError",
    "ConnectionClosedError",
    "ConnectTimeoutError",
    "ReadTimeoutError",
    "IncompleteReadError",
    "ResponseStreamingError",
    "HTTPClientError",
    "IncompleteRead",
    "ProtocolError",
    "ResponseParserError",
    "_Truncated",
}
_NO_CREDENTIALS = {
    "NoCredentialsError",
    "PartialCredentialsError",
    "CredentialRetrievalError",
    "TokenRetrievalError",
    "UnauthorizedSSOTokenError",
    "SSOTokenLoadError",
    "ProfileNotFound",
    "RefreshWithMFAUnsupportedError",
}
_WRONG_CREDENTIALS = {
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "ExpiredToken",
    "InvalidToken",
    "TokenRefreshRequired",
    "InvalidSecurity",
}
_WHERE = (
    f"credentials are looked for in the folder that {ENV_CREDENTIALS_DIR} names, else where the AWS SDK does: the "
    "environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY), the credentials file (AWS_SHARED_CREDENTIALS_FILE or "
    "~/.aws/credentials, profile AWS_PROFILE), then web or machine identity"
)


def error_code(error: BaseException) -> str:
    """Return S3's error code, such as `NoSuchKey`; empty where the error is not an answer of the server."""
    response = getattr(error, "response", None)
    return str(response.get("Error", {}).get("Code", "")) if isinstance(response, dict) else ""


def error_status(error: BaseException) -> int:
    """Return the HTTP status; 0 where the error is not an answer of the server."""
    response = getattr(error, "response", None)
    return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)) if isinstance(response, dict) else 0


def is_absent(error: BaseException) -> bool:
    """Tell whether the server said that the key, the bucket or the upload does not exist."""
    return error_status(error) == 404


def is_transient(error: Exception) -> bool:
    """Tell whether the same request may succeed a moment later."""
    status = error_status(error)
    if status:
        return status in _TRANSIENT_STATUS or error_code(error) in _TRANSIENT_CODES
    return type(error).__name__ in _TRANSIENT_ERRORS or isinstance(error, ConnectionError | TimeoutError)


def store_error(error: Exception, key: str, uri: str, endpoint: str | None) -> StoreError:
    """Return the store's error for what came out of botocore after the last try."""
    status = error_status(error)
    where = public_endpoint(endpoint) if endpoint else "AWS"
    if status:
        return _of_answer(error, key, uri, f"{where} answered {status} {error_code(error)}".rstrip())
    name = type(error).__name__
    if name in _NO_CREDENTIALS:
        return AccessDenied(key, f"no usable credentials for {uri} ({name}); {_WHERE}")
    if is_transient(error) or "SSL" in name:
        return Unreachable(key, f"{uri} cannot be reached ({where}: {name}); check endpoint and network")
    return StoreError(key, f"the request failed ({where}: {name})")


def _of_answer(error: Exception, key: str, uri: str, answer: str) -> StoreError:
    code, status = error_code(error), error_status(error)
    if code in _WRONG_CREDENTIALS:
        return AccessDenied(key, f"wrong credentials for {uri} ({answer}); {_WHERE}")
    if status in (401, 403):
        return AccessDenied(key, f"access to {uri} is refused ({answer}): wrong credentials, or no right; {_WHERE}")
    if status == 404:
        what = "the bucket does not exist" if code == "NoSuchBucket" else "there is no such object"
        return NotFound(key, f"{what} in {uri} ({answer})")
    if status == 412:
        return Corrupt(key, f"the object was replaced while it was read ({answer})")
    if is_transient(error):
        return Unreachable(key, f"{uri} kept failing ({answer}); the server is overloaded or ill, try again later")
    return StoreError(key, f"the request failed ({answer})")
