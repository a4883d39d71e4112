"""Translation of S3 errors: whether a retry may help, and which StoreError they become. Does not import botocore.

Messages contain error codes only: a server's text may repeat request headers, and with them credentials.
"""

from __future__ import annotations

from stagecoach_api.names import ENV_CREDENTIALS_DIR
from stagecoach_api.stores.base import AccessDenied, Corrupt, NotFound, StoreError, Unreachable, public_endpoint

# 408 request time-out, 429 too many requests, 5xx server errors except 501 (not implemented).
_TRANSIENT_STATUS = {408, 429, 500, 502, 503, 504}
_TRANSIENT_CODES = {
    "RequestTimeout",
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "InternalError",
    "BadDigest",  # the server's checksum shows that the bytes were damaged in transit
    "ConditionalRequestConflict",  # another conditional write of the key is in progress; the next attempt gets 412
    "OperationAborted",
}
# Names of botocore's and urllib3's classes, since botocore is not imported here; `_Truncated` is that of `s3.py`.
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
    f"credentials are read from the folder in {ENV_CREDENTIALS_DIR}, else from where the AWS SDK looks: the "
    "environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY), the credentials file (AWS_SHARED_CREDENTIALS_FILE or "
    "~/.aws/credentials, profile AWS_PROFILE), then the web or machine identity"
)


def error_code(error: BaseException) -> str:
    """Return S3's error code, such as `NoSuchKey`; empty if the error is not a response of the server."""
    response = getattr(error, "response", None)
    return str(response.get("Error", {}).get("Code", "")) if isinstance(response, dict) else ""


def error_status(error: BaseException) -> int:
    """Return the HTTP status; 0 if the error is not a response of the server."""
    response = getattr(error, "response", None)
    return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)) if isinstance(response, dict) else 0


def is_absent(error: BaseException) -> bool:
    """Return whether the server reported that the key, the bucket or the upload does not exist."""
    return error_status(error) == 404


def is_transient(error: Exception) -> bool:
    """Return whether the same request may succeed if it is retried."""
    status = error_status(error)
    if status:
        return status in _TRANSIENT_STATUS or error_code(error) in _TRANSIENT_CODES
    return type(error).__name__ in _TRANSIENT_ERRORS or isinstance(error, ConnectionError | TimeoutError)


def store_error(error: Exception, key: str, uri: str, endpoint: str | None) -> StoreError:
    """Return the StoreError for an error that botocore raised in the last attempt."""
    status = error_status(error)
    where = public_endpoint(endpoint) if endpoint else "AWS"
    if status:
        return _response_error(error, key, uri, f"{where} answered {status} {error_code(error)}".rstrip())
    name = type(error).__name__
    if name in _NO_CREDENTIALS:
        return AccessDenied(key, f"no usable credentials for {uri} ({name}); {_WHERE}")
    # A TLS error is not retried, because certificates do not change in seconds, but means the same: not reachable.
    if is_transient(error) or "SSL" in name:
        return Unreachable(key, f"{uri} cannot be reached ({where}: {name}); check endpoint and network")
    return StoreError(key, f"the request failed ({where}: {name})")


def _response_error(error: Exception, key: str, uri: str, answer: str) -> StoreError:
    code, status = error_code(error), error_status(error)
    if code in _WRONG_CREDENTIALS:
        return AccessDenied(key, f"wrong credentials for {uri} ({answer}); {_WHERE}")
    if status in (401, 403):
        return AccessDenied(
            key, f"access to {uri} is denied ({answer}): wrong credentials, or a missing permission; {_WHERE}"
        )
    if status == 404:
        what = "the bucket does not exist" if code == "NoSuchBucket" else "there is no such object"
        return NotFound(key, f"{what} in {uri} ({answer})")
    if status == 412:
        return Corrupt(key, f"the object was replaced while it was read ({answer})")
    if is_transient(error):
        return Unreachable(key, f"{uri} kept failing ({answer}); the server is overloaded or broken, try again later")
    return StoreError(key, f"the request failed ({answer})")
