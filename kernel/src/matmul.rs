//! Products of f32 tensors in main memory, for the gradient: candle's own asks the system for its number of processors at every call, which takes longer than a small
//! product, and takes as many threads as it finds.
#![allow(unsafe_code)]

use candle_core::{Device, Layout, Result, Storage, Tensor, bail};

/// Who computes a product in main memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Threads {
    /// The caller alone: for work that runs side by side itself.
    One,
    /// As many as rayon's pool has, if the product is large enough.
    All,
}

/// Rows, columns, and the strides to the next row, column and matrix.
struct Strides {
    rows: usize,
    columns: usize,
    row: usize,
    column: usize,
    matrix: usize,
}

/// The count of matrices, and the strides of each; the numbers must lie within `len`.
fn strides(layout: &Layout, len: usize) -> Result<(usize, Strides)> {
    let (dims, stride) = (layout.dims(), layout.stride());
    let (count, matrix) = match dims.len() {
        2 => (1, 0),
        3 => (dims[0], stride[0]),
        rank => bail!("a product of tensors of rank {rank}"),
    };
    let [rows, columns] = [dims[dims.len() - 2], dims[dims.len() - 1]];
    let [row, column] = [stride[dims.len() - 2], stride[dims.len() - 1]];
    let last = |size: usize, stride: usize| size.saturating_sub(1) * stride;
    let end = last(rows, row) + last(columns, column) + last(count, matrix) + 1;
    if count * rows * columns > 0 && layout.start_offset() + end > len {
        bail!("a tensor that ends after its storage");
    }
    Ok((count, Strides { rows, columns, row, column, matrix }))
}

/// `a b`, f32: `[m, k]` by `[k, n]`, or a batch of as many of each. In main memory any strides will do, and the bits depend on the shapes and strides only, not on threads;
/// on another device this is candle's product.
///
/// # Errors
/// Shapes that do not fit, other types.
pub fn matmul(a: &Tensor, b: &Tensor, threads: Threads) -> Result<Tensor> {
    if !a.device().is_cpu() {
        return a.matmul(b);
    }
    let ((a_storage, a_layout), (b_storage, b_layout)) = (a.storage_and_layout(), b.storage_and_layout());
    let (Storage::Cpu(a_values), Storage::Cpu(b_values)) = (&*a_storage, &*b_storage) else {
        bail!("tensors that are not in main memory")
    };
    let (a_values, b_values) = (a_values.as_slice::<f32>()?, b_values.as_slice::<f32>()?);
    let (count, a) = strides(a_layout, a_values.len())?;
    let (b_count, b) = strides(b_layout, b_values.len())?;
    if a.columns != b.rows || count != b_count {
        bail!("a product of {:?} and {:?}", a_layout.dims(), b_layout.dims());
    }
    let (m, k, n) = (a.rows, a.columns, b.columns);
    let shape = if a_layout.dims().len() == 3 { vec![count, m, n] } else { vec![m, n] };
    if k == 0 {
        return Tensor::zeros(shape, candle_core::DType::F32, &Device::Cpu);
    }
    let parallelism = match threads {
        Threads::One => gemm::Parallelism::None,
        Threads::All => match rayon::current_num_threads() {
            0 | 1 => gemm::Parallelism::None,
            threads => gemm::Parallelism::Rayon(threads),
        },
    };
    let size = m * n;
    let mut out: Vec<f32> = Vec::with_capacity(count * size);
    for i in 0..count {
        // SAFETY: `strides` made sure that every number of both matrices lies in its storage, which is locked for reading; matrix i of `out` has room for m n numbers
        // inside the capacity, which only this call writes, and all of them, because it does not read them.
        unsafe {
            gemm::gemm(
                m,
                n,
                k,
                out.as_mut_ptr().add(i * size),
                1,
                n as isize,
                false,
                a_values.as_ptr().add(a_layout.start_offset() + i * a.matrix),
                a.column as isize,
                a.row as isize,
                b_values.as_ptr().add(b_layout.start_offset() + i * b.matrix),
                b.column as isize,
                b.row as isize,
                0.0,
                1.0,
                false,
                false,
                false,
                parallelism,
            );
        }
    }
    // SAFETY: every matrix of `out` was written above; with m, n or the count zero there are none.
    unsafe { out.set_len(count * size) };
    Tensor::from_vec(out, shape, &Device::Cpu)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(shape: &[usize]) -> Tensor {
        let count = shape.iter().product::<usize>();
        let values: Vec<f32> = (0..count).map(|i| ((i * 37 + 11) % 101) as f32 * 0.02 - 1.0).collect();
        Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
    }

    fn worst(a: &Tensor, b: &Tensor) -> f32 {
        assert_eq!(a.dims(), b.dims());
        (a - b).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar().unwrap()
    }

    #[test]
    fn it_is_candles_product_for_all_strides() {
        for (m, k, n) in [(1, 1, 1), (7, 33, 5), (130, 64, 200), (1, 40, 9), (64, 7, 1)] {
            let (a, b) = (tensor(&[m, k]), tensor(&[k, n]));
            let want = a.matmul(&b).unwrap();
            let transposed = |x: &Tensor| x.t().unwrap().contiguous().unwrap().t().unwrap();
            let wide = Tensor::cat(&[tensor(&[k, 3]), b.clone()], 1).unwrap();
            for threads in [Threads::One, Threads::All] {
                for a in [a.clone(), transposed(&a)] {
                    for b in [b.clone(), transposed(&b), wide.narrow(1, 3, n).unwrap()] {
                        assert!(worst(&matmul(&a, &b, threads).unwrap(), &want) < 1e-4, "{m} {k} {n}");
                    }
                }
            }
        }
        let (a, b) = (tensor(&[3, 5, 8]), tensor(&[3, 6, 8]));
        let want = a.matmul(&b.t().unwrap()).unwrap();
        assert!(worst(&matmul(&a, &b.t().unwrap(), Threads::One).unwrap(), &want) < 1e-5);
        let turned = a.transpose(0, 1).unwrap().contiguous().unwrap().transpose(0, 1).unwrap();
        assert!(worst(&matmul(&turned, &b.t().unwrap(), Threads::All).unwrap(), &want) < 1e-5);
    }

    #[test]
    fn what_does_not_fit_is_an_error_and_nothing_is_nothing() {
        assert!(matmul(&tensor(&[2, 3]), &tensor(&[4, 2]), Threads::One).is_err());
        assert!(matmul(&tensor(&[2, 2, 3]), &tensor(&[1, 3, 2]), Threads::One).is_err());
        assert!(matmul(&tensor(&[3]), &tensor(&[3]), Threads::One).is_err());
        for (m, k, n) in [(0, 3, 4), (2, 0, 4), (2, 3, 0)] {
            let product = matmul(&tensor(&[m, k]), &tensor(&[k, n]), Threads::All).unwrap();
            assert_eq!(product.dims(), [m, n]);
            assert!(product.flatten_all().unwrap().to_vec1::<f32>().unwrap().iter().all(|x| *x == 0.0));
        }
    }
}
