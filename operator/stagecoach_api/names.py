"""Names shared by several packages: the API group, environment variables, files of an attempt. Defined once, here."""

from __future__ import annotations

API_GROUP = "stagecoach.dev"
API_VERSION = "v1alpha1"
API_GROUP_VERSION = f"{API_GROUP}/{API_VERSION}"
KIND = "TrainingRun"
PLURAL = "trainingruns"
SINGULAR = "trainingrun"
SHORT_NAME = "tr"

# Environment variables that a driver sets for the trainer's launcher. None holds a secret: those are mounted files.
ENV_STAGE_FILE = "STAGECOACH_STAGE_FILE"
"""Path of `stage.json`, the resolved stage."""
ENV_WORK_DIR = "STAGECOACH_WORK_DIR"
"""Folder of this attempt: scratch, logs, local checkpoints."""
ENV_CACHE_DIR = "STAGECOACH_CACHE_DIR"
"""Folder shared by all attempts on this machine, for fetched inputs and tokenised shards."""
ENV_RESULT_FILE = "STAGECOACH_RESULT_FILE"
"""Path of the file to which the launcher writes the attempt's result (on a cluster: the termination message)."""
ENV_PROGRESS_FILE = "STAGECOACH_PROGRESS_FILE"
"""Path of the progress file: JSON lines with progress, which also serve as heartbeats."""
ENV_THREADS = "STAGECOACH_THREADS"
"""Number of CPU threads of each rank. Always set, because it changes the last digits of a sum."""
ENV_CREDENTIALS_DIR = "STAGECOACH_CREDENTIALS_DIR"
"""Folder with S3 credentials, one file each (`ACCESS_KEY_FILE`, `SECRET_KEY_FILE`). If unset:
the AWS SDK's own credential chain."""
ENV_ENDPOINT_KEYS = "STAGECOACH_ENDPOINT_KEYS"
"""Folder with the API keys of endpoints: one folder per Secret, with an `ENDPOINT_KEY_FILE` in it."""

# Rendezvous of a stage with several pods: torchrun's own variables, which the launcher passes on.
ENV_NUM_NODES = "PET_NNODES"
ENV_RANKS_PER_NODE = "PET_NPROC_PER_NODE"
ENV_NODE_RANK = "PET_NODE_RANK"
ENV_MASTER_ADDRESS = "PET_MASTER_ADDR"
ENV_MASTER_PORT = "PET_MASTER_PORT"
MASTER_PORT = 29500
"""Default port of the rendezvous at rank 0."""

# Where a stage reports its progress: the names of Kubeflow Trainer's KEP-2779. The last two are paths of files.
ENV_PROGRESS_URL = "KUBEFLOW_TRAINER_SERVER_URL"
ENV_PROGRESS_CA = "KUBEFLOW_TRAINER_SERVER_CA_CERT"
ENV_PROGRESS_TOKEN = "KUBEFLOW_TRAINER_SERVER_TOKEN"  # noqa: S105  # the name of a variable

# Files of one attempt, below its work folder.
STAGE_FILE = "stage.json"
RESULT_FILE = "result.json"
PROGRESS_FILE = "progress.jsonl"
LOG_FILE = "log.txt"

# The pod of a stage: its container and what is mounted into it.
REPLICATED_JOB = "w"
"""Name of the only replicated job of an attempt's JobSet; part of every pod's name and host name."""
TRAINER_CONTAINER = "trainer"
STAGE_MOUNT = "/etc/stagecoach/stage"
"""The attempt's ConfigMap, read-only: `STAGE_FILE` and, for the progress server's certificate, `CA_FILE`."""
CA_FILE = "ca.crt"
DATA_MOUNT = "/var/lib/stagecoach"
"""Scratch space of a pod, deleted with it. A single mount, so that files can be moved between the two folders below."""
WORK_FOLDER = f"{DATA_MOUNT}/work"
CACHE_FOLDER = f"{DATA_MOUNT}/cache"
CREDENTIALS_MOUNT = "/var/run/secrets/stagecoach/credentials"
ACCESS_KEY_FILE = "accessKeyId"
"""Key in the Secret with the credentials, and therefore the name of the file."""
SECRET_KEY_FILE = "secretAccessKey"  # noqa: S105  # the name of a file
ENDPOINT_KEYS_MOUNT = "/var/run/secrets/stagecoach/endpoints"
"""API keys of endpoints, in one folder per Secret that has the Secret's name."""
ENDPOINT_KEY_FILE = "apiKey"
"""Key in the Secret of an endpoint, and therefore the name of the file."""
TOKEN_MOUNT = "/var/run/secrets/stagecoach/progress"  # noqa: S105  # a path
TOKEN_FILE = "token"  # noqa: S105  # the name of a file
TEMPORARY_MOUNT = "/tmp"  # noqa: S108  # of the container
SHARED_MEMORY_MOUNT = "/dev/shm"  # noqa: S108
POD_MOUNTS = (
    STAGE_MOUNT, DATA_MOUNT, TEMPORARY_MOUNT, SHARED_MEMORY_MOUNT, CREDENTIALS_MOUNT, ENDPOINT_KEYS_MOUNT, TOKEN_MOUNT
)  # fmt: skip
"""Where the operator itself mounts something: a run's volumes go elsewhere."""
TERMINATION_LOG = "/dev/termination-log"
"""Kubernetes' termination message, to which the launcher writes the attempt's result."""

# Labels and annotations of the objects that the operator creates.
LABEL_MANAGED_BY = "app.kubernetes.io/managed-by"
MANAGED_BY = "stagecoach"
"""Value of `LABEL_MANAGED_BY`; also the field manager of server-side apply."""
LABEL_RUN = f"{API_GROUP}/run"
LABEL_RUN_UID = f"{API_GROUP}/run-uid"
LABEL_STAGE = f"{API_GROUP}/stage"
LABEL_ATTEMPT = f"{API_GROUP}/attempt"
MANAGER = f"{API_GROUP}/operator"
"""Value of `spec.managedBy` for this operator."""
ANNOTATION_INSTALLATION = f"{API_GROUP}/installation"
"""Hands a run over to an installation of the operator, named by namespace and Lease."""
ANNOTATION_RETRY = f"{API_GROUP}/retry"
"""On a run: any text, such as the time. A new value asks for a retry: failures until then are not charged."""
ANNOTATION_STAGE_DIGEST = f"{API_GROUP}/stage-digest"
FINALIZER = f"{API_GROUP}/attempts"
"""On TrainingRuns of earlier versions; removed wherever it is seen."""

# Names of Kubernetes and of the components installed in the cluster.
JOBSET_GROUP = "jobset.x-k8s.io"
JOBSET_VERSION = "v1alpha2"
JOBSET_PLURAL = "jobsets"
JOBSET_KIND = "JobSet"
LABEL_JOBSET_NAME = f"{JOBSET_GROUP}/jobset-name"
COMPLETION_INDEX = "batch.kubernetes.io/job-completion-index"
"""Annotation and label of an Indexed Job's pod: its index, which is the node rank."""
KUEUE_GROUP = "kueue.x-k8s.io"
KUEUE_WORKLOAD_VERSION = "v1beta2"
KUEUE_WORKLOAD_PLURAL = "workloads"
LABEL_QUEUE = f"{KUEUE_GROUP}/queue-name"
LABEL_QUEUE_PRIORITY = f"{KUEUE_GROUP}/priority-class"
ANNOTATION_REQUIRED_TOPOLOGY = f"{KUEUE_GROUP}/podset-required-topology"
ANNOTATION_PREFERRED_TOPOLOGY = f"{KUEUE_GROUP}/podset-preferred-topology"
GPU_RESOURCE = "nvidia.com/gpu"
"""Extended resource of a GPU, and the key of the taint that keeps other pods off GPU nodes."""
LABEL_HOSTNAME = "kubernetes.io/hostname"
LABEL_GPU_PRODUCT = "nvidia.com/gpu.product"


def progress_path(namespace: str, attempt: str) -> str:
    """Return the path, relative to the progress server's URL, to which the attempt with this JobSet name reports."""
    return f"/apis/{API_GROUP_VERSION}/namespaces/{namespace}/attempts/{attempt}/status"


def progress_audience(namespace: str, attempt: str) -> str:
    """Return the audience of the token with which an attempt's pods report. It is valid for this attempt only."""
    return f"{API_GROUP}/progress/{namespace}/{attempt}"


DEFAULT_LOCAL_ROOT = ".stagecoach"
"""Folder, relative to the working directory, for local artifacts, attempts and caches if the run names no storage."""
