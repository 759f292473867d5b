//! The curve of a run as an SVG file.

use std::path::Path;

use plotters::prelude::{
    BLACK, ChartBuilder, Color, IntoDrawingArea, IntoFont, LineSeries, RGBColor, SVGBackend, WHITE,
};
use serde_json::Value;

use super::{files::write, progress::values};
use crate::app::AppError;

/// Steps that the smooth line averages.
const WINDOW: usize = 5;
const SIZE: (u32, u32) = (720, 400);
const PALE: RGBColor = RGBColor(170, 190, 220);
const STRONG: RGBColor = RGBColor(20, 80, 170);

/// Draws mean reward (or loss) over steps: every step, and a moving average.
pub(super) fn write_svg(path: &Path, title: &str, curve: &[Value]) -> Result<(), AppError> {
    let svg = draw(title, curve).map_err(|error| AppError::Train(format!("{}: {error}", path.display())))?;
    write(path, svg.as_bytes())
}

fn draw(title: &str, curve: &[Value]) -> Result<String, String> {
    let (name, values) = values(curve);
    let least = values.iter().copied().fold(0.0, f64::min);
    let most = values.iter().copied().fold(least + 1e-3, f64::max);
    let mut svg = String::new();
    {
        let failed = |error: &dyn std::fmt::Display| error.to_string();
        let area = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        area.fill(&WHITE).map_err(|error| failed(&error))?;
        let mut chart = ChartBuilder::on(&area)
            .caption(title, ("sans-serif", 18).into_font().color(&BLACK))
            .margin(16)
            .x_label_area_size(36)
            .y_label_area_size(52)
            .build_cartesian_2d(1.0..(values.len().max(2) as f64), least..most * 1.05)
            .map_err(|error| failed(&error))?;
        chart.configure_mesh().x_desc("step").y_desc(name).draw().map_err(|error| failed(&error))?;
        let points = |values: &[f64]| -> Vec<(f64, f64)> {
            values.iter().enumerate().map(|(at, &value)| (at as f64 + 1.0, value)).collect()
        };
        let smooth: Vec<f64> = (1..=values.len())
            .map(|end| {
                let window = &values[end.saturating_sub(WINDOW)..end];
                window.iter().sum::<f64>() / window.len() as f64
            })
            .collect();
        chart.draw_series(LineSeries::new(points(&values), PALE)).map_err(|error| failed(&error))?;
        chart.draw_series(LineSeries::new(points(&smooth), STRONG.stroke_width(2))).map_err(|error| failed(&error))?;
        area.present().map_err(|error| failed(&error))?;
    }
    Ok(svg)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn every_step_is_a_point() {
        let curve: Vec<Value> = (0..7).map(|step| json!({"reward_mean": f64::from(step) / 10.0})).collect();
        let svg = draw("grpo, 13 numbers", &curve).unwrap();
        assert!(svg.starts_with("<svg") && svg.contains("grpo, 13 numbers") && svg.contains("mean reward"));
        let lines: Vec<&str> = svg.lines().filter(|line| line.contains("<polyline")).collect();
        assert!(lines.iter().any(|line| line.split(' ').filter(|word| word.contains(',')).count() >= 7), "{lines:?}");
        draw("nothing", &[]).unwrap();
    }
}
