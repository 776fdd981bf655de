//! The main job.
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use tests::architecture::Architecture;
use tests::phases::{BLACKOUT_BEGINS, PHASES};
use tests::{demo, paths};

on_each_architecture![linux_and_the_oracle_outlive_a_change_of_kernel_and_the_way_back];

fn linux_and_the_oracle_outlive_a_change_of_kernel_and_the_way_back(architecture: Architecture) -> Result<()> {
    let name = "upgrade".to_owned();
    std::fs::create_dir_all(paths::lab(architecture))?;
    let json = paths::lab(architecture).join("upgrade.json");
    let options = demo::Options { name, architecture, accelerator: None, json: Some(json.clone()) };
    ensure!(demo::run(&options)?, "the demo failed");
    let result: Value = serde_json::from_str(&std::fs::read_to_string(&json)?)?;
    ensure!(result["result"] == "pass" && result["arch"] == architecture.name(), "{result}");
    let updates = result["updates"].as_array().context("no updates")?;
    ensure!(updates.len() == 2, "{result}");
    for (generation, update) in (1..).zip(updates) {
        ensure!(update["generation"] == generation && update["from"] != update["to"], "{update}");
        let blackout = update["blackout_ms"].as_f64().context("no blackout")?;
        let phases = update["guests"][0]["phases"].as_object().context("no phases")?;
        // The phases of the blackout are its parts, so they add up to it.
        let dark = PHASES.iter().skip_while(|phase| **phase != BLACKOUT_BEGINS);
        let sum: f64 = dark.filter_map(|phase| phases.get(*phase)?.as_f64()).sum();
        let own = update["guests"][0]["blackout_ms"].as_f64().context("no blackout")?;
        ensure!((sum - own).abs() < 0.01 * own + 1.0, "phases of {sum} ms make no blackout of {own} ms: {update}");
        ensure!(blackout >= own, "{update}");
    }
    ensure!(updates[0]["from"] == updates[1]["to"] && updates[0]["to"] == updates[1]["from"], "{result}");
    Ok(())
}
