"""The bridge and the forwarding that pods need from the kernel, and their removal."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

from tests.cluster.layout import BRIDGE, POD_NETWORK, Layout
from tests.cluster.processes import run, succeeds
from tests.cluster.report import ClusterError

FORWARDING = Path("/proc/sys/net/ipv4/ip_forward")
OUR_CHAINS = ("KUBE-", "CNI-")
"""Prefixes of the chains of kube-proxy, kubelet and the CNI plugins."""
TABLES = ("nat", "filter", "mangle", "raw")
CNI_NETWORK = "stagecoach"
CNI_RESULTS = Path("/var/lib/cni/results")
DEFAULT_MTU = 1500


def set_up(layout: Layout) -> None:
    """Create the bridge with its address and enable forwarding in the kernel.

    Raises ClusterError on a machine that is already a node: removing our chains would remove that node's, too.
    """
    FORWARDING.write_text("1")
    if not succeeds(["ip", "link", "show", BRIDGE]):
        if any(removals(list_rules("iptables", table)) for table in TABLES):
            raise ClusterError("this machine has chains of Kubernetes or CNI: it is already a node of another cluster")
        run(["ip", "link", "add", BRIDGE, "type", "bridge"])
        run(["ip", "address", "add", f"{layout.address}/{POD_NETWORK.prefixlen}", "dev", BRIDGE])
    run(["ip", "link", "set", BRIDGE, "up"])


def tear_down() -> None:
    """Remove the bridge, the chains and the CNI plugins' records of pods."""
    if succeeds(["ip", "link", "show", BRIDGE]):
        run(["ip", "link", "delete", BRIDGE])
    for program in ("iptables", "ip6tables"):
        if shutil.which(program):
            for table in TABLES:
                remove_chains(program, table)
    remove_cni_results()


def remove_chains(program: str, table: str) -> None:
    """Remove the chains of Kubernetes and CNI from a table, and the rules that jump to them."""
    for change in removals(list_rules(program, table)):
        run([program, "--wait", "--table", table, *change])


def list_rules(program: str, table: str) -> list[str]:
    """Return the rules of a table in the command's own syntax; none if the kernel lacks the table."""
    command = [program, "--wait", "--table", table, "--list-rules"]
    return run(command).splitlines() if succeeds(command) else []


def removals(rules: list[str]) -> list[list[str]]:
    """Return the arguments that remove our chains, given a table's rules as `iptables --list-rules` prints them.

    First the rules in other chains that jump to ours, then our chains' own rules, then the chains.
    """
    chains = [name for name in (rule.split()[1] for rule in rules if rule.startswith("-N ")) if _is_ours(name)]
    changes = []
    for rule in rules:
        parts = shlex.split(rule)
        if parts[0] == "-A" and not _is_ours(parts[1]) and "-j" in parts and _is_ours(parts[parts.index("-j") + 1]):
            changes.append(["-D", *parts[1:]])
    return [*changes, *(["-F", chain] for chain in chains), *(["-X", chain] for chain in chains)]


def remove_cni_results() -> None:
    """Remove libcni's cached results for our network's pods."""
    for file in CNI_RESULTS.glob(f"{CNI_NETWORK}-*"):
        file.unlink()


def smallest_mtu() -> int:
    """Return the largest packet, in bytes, that all of the machine's links can carry; `ip` prints {} for links down."""
    links = json.loads(run(["ip", "-json", "link", "show", "up"]))
    return min((link["mtu"] for link in links if link.get("link_type") == "ether"), default=DEFAULT_MTU)


def _is_ours(chain: str) -> bool:
    return chain.startswith(OUR_CHAINS)
