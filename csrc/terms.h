// The mathematics of the losses at one voxel, written once for every device. The specification is `<op>_ref` in
// sslfast/ops.
//
// A term reads kMaps logits maps, of which the first kStudents have a gradient, and one number per voxel (see Side).
//   sums(z, side, classes, to)         adds the voxel to the sums: to.scalar(i, x) to one of kScalars, to.row(r, c, x)
//                                      to one of kRows per class. Rows are for foreground classes, c > 0.
//   gradient(z, side, classes, g, to)  computes the gradient of the logits from those of the sums, g.scalar(i) and
//                                      g.row(r, c).
// Both are 0 where the side is negative. In memory the scalars come first, then the rows [kRows, C], in the order of
// the op's slots in sslfast/ops.
#pragma once

#include <cmath>

#include "voxel_math.h"

#define FOR_BOTH(n) FOR_CLASSES(n, 0, 2, 2)  // for both networks

namespace sslfast {

// Gradient, by a voxel's logits, of
//   -ce log p_t + sum_c (linear_c p_c [t = c] + square_c p_c^2) + off / 2 |p - onehot|^2,
// with linear_c = g.row(linear, c) and square_c = g.row(square, c) for c >= 1. It is p (G - sum p G) + ce (p - onehot);
// G is the gradient of the last two terms by p. ce is an F, or one float for all voxels.
template <int kClassCapacity, class F, class Ce, class G>
VOXEL_FN void target_gradient(const Prediction<kClassCapacity, F>& of, F target, int classes, Ce ce, F off, const G& g,
                              int linear, int square, F (&to)[kClassCapacity]) {
  const F one = F{} + 1.f;
  F along = {};
  FOR_CLASSES(c, 0, kClassCapacity, classes) {
    const F onehot = select(target == float(c), one, F{});
    to[c] = off * (of.p[c] - onehot);
    if (c > 0) to[c] = to[c] + g.row(linear, c) * onehot + 2.f * g.row(square, c) * of.p[c];
    along = along + of.p[c] * to[c];
  }
  FOR_CLASSES(c, 0, kClassCapacity, classes) {
    const F onehot = select(target == float(c), one, F{});
    to[c] = of.p[c] * (to[c] - along) + ce * (of.p[c] - onehot);
  }
}

// Both networks against the labels; the discrepancy is on voxels where their confident foreground classes differ.
struct DualSupervised {
  static constexpr int kMaps = 2, kStudents = 2;
  enum Scalar { kLabelled, kMask, kOutside, kCe, kDiscrepancy = kCe + 2, kScalars = kDiscrepancy + 2 };
  enum Row { kSize, kOverlap, kSquare = kOverlap + 2, kClassCe = kSquare + 2, kRows = kClassCe + 2 };

  float threshold;

  template <int kClassCapacity, class F>
  VOXEL_FN F confident(const Prediction<kClassCapacity, F>& of) const {
    return select(of.confidence >= threshold, of.label, F{});
  }

  template <int kClassCapacity, class F, class Sums>
  VOXEL_FN void sums(const F (&z)[kMaps][kClassCapacity], F label, int classes, Sums& to) const {
    const Prediction<kClassCapacity, F> of[2] = {{z[0], classes}, {z[1], classes}};
    const F one = F{} + 1.f;
    const auto labelled = label >= 0.f;
    const auto mask = labelled & (confident(of[0]) != confident(of[1]));
    to.scalar(kLabelled, select(labelled, one, F{}));
    to.scalar(kMask, select(mask, one, F{}));
    to.scalar(kOutside, select(label == kOutOfRange, one, F{}));
    F ce[2];
    FOR_BOTH(n) {
      F log_p = {}, off = {};
      FOR_CLASSES(c, 0, kClassCapacity, classes) {
        const auto here = label == float(c);
        const F apart = of[n].p[c] - select(here, one, F{});
        log_p = select(here, of[n].log_p(c), log_p);
        off = off + apart * apart;
      }
      ce[n] = F{} - log_p;
      to.scalar(kCe + n, ce[n]);
      to.scalar(kDiscrepancy + n, select(mask, 0.5f * off, F{}));
    }
    FOR_CLASSES(c, 1, kClassCapacity, classes) {
      const auto here = label == float(c);
      to.row(kSize, c, select(here, one, F{}));
      FOR_BOTH(n) {
        to.row(kOverlap + n, c, select(here, of[n].p[c], F{}));
        to.row(kSquare + n, c, select(labelled, of[n].p[c] * of[n].p[c], F{}));
        to.row(kClassCe + n, c, select(here, ce[n], F{}));
      }
    }
  }

  template <int kClassCapacity, class F, class G>
  VOXEL_FN void gradient(const F (&z)[kMaps][kClassCapacity], F label, int classes, const G& g,
                         F (&to)[kStudents][kClassCapacity]) const {
    const Prediction<kClassCapacity, F> of[2] = {{z[0], classes}, {z[1], classes}};
    const auto labelled = label >= 0.f;
    const auto mask = labelled & (confident(of[0]) != confident(of[1]));
    FOR_BOTH(n) {
      const F off = select(mask, F{} + g.scalar(kDiscrepancy + n), F{});
      F ce = {};
      FOR_CLASSES(c, 1, kClassCapacity, classes) ce = select(label == float(c), F{} + g.row(kClassCe + n, c), ce);
      ce = ce + g.scalar(kCe + n);
      target_gradient(of[n], label, classes, ce, off, g, kOverlap + n, kSquare + n, to[n]);
      FOR_CLASSES(c, 0, kClassCapacity, classes) to[n][c] = select(labelled, to[n][c], F{});
    }
  }
};

// A network against the pseudo-labels of the reliable voxels. Flags out of range make the cross-entropy NaN.
struct PseudoSupervised {
  static constexpr int kMaps = 1, kStudents = 1;
  enum Scalar { kVoxels, kNumSelected, kCe, kScalars };
  enum Row { kSize, kOverlap, kSquare, kRows };

  template <int kClassCapacity, class F, class Sums>
  VOXEL_FN void sums(const F (&z)[kMaps][kClassCapacity], F flags, int classes, Sums& to) const {
    const Prediction<kClassCapacity, F> of(z[0], classes);
    const F one = F{} + 1.f, target = flags - float(kReliable);  // below 0 where not reliable
    const auto reliable = target >= 0.f;
    F log_p = {};
    FOR_CLASSES(c, 0, kClassCapacity, classes) log_p = select(target == float(c), of.log_p(c), log_p);
    to.scalar(kVoxels, select(flags >= 0.f, one, F{}));
    to.scalar(kNumSelected, select(reliable, one, F{}));
    to.scalar(kCe, select(flags == kOutOfRange, F{} + NAN, F{} - log_p));
    FOR_CLASSES(c, 1, kClassCapacity, classes) {
      const auto here = target == float(c);
      to.row(kSize, c, select(here, one, F{}));
      to.row(kOverlap, c, select(here, of.p[c], F{}));
      to.row(kSquare, c, select(reliable, of.p[c] * of.p[c], F{}));
    }
  }

  template <int kClassCapacity, class F, class G>
  VOXEL_FN void gradient(const F (&z)[kMaps][kClassCapacity], F flags, int classes, const G& g,
                         F (&to)[kStudents][kClassCapacity]) const {
    const Prediction<kClassCapacity, F> of(z[0], classes);
    const F target = flags - float(kReliable);
    target_gradient(of, target, classes, g.scalar(kCe), F{}, g, kOverlap, kSquare, to[0]);
    FOR_CLASSES(c, 0, kClassCapacity, classes) to[0][c] = select(target >= 0.f, to[0][c], F{});
  }
};

// Agreement of a student p and a teacher q: KL = sum q log(q / p), CE = -log p at the teacher's class, cos(p, q).
template <int kClassCapacity, class F>
struct Agreement {
  F ce = {}, kl = {}, weight, cosine, inverse_p, inverse_q;  // e^-KL; 1 / |p|, 1 / |q|

  VOXEL_FN Agreement(const Prediction<kClassCapacity, F>& student, const Prediction<kClassCapacity, F>& teacher,
                     int classes) {
    F product = {}, square_p = {}, square_q = {};
    FOR_CLASSES(c, 0, kClassCapacity, classes) {
      const F p = student.p[c], q = teacher.p[c];
      kl = kl + q * (teacher.log_p(c) - student.log_p(c));
      ce = select(teacher.label == float(c), F{} - student.log_p(c), ce);
      product = product + p * q;
      square_p = square_p + p * p;
      square_q = square_q + q * q;
    }
    weight = exp(F{} - kl);
    inverse_p = inverse_root(square_p);
    inverse_q = inverse_root(square_q);
    cosine = product * (inverse_p * inverse_q);
  }
};

// A student p and a teacher q: e^-KL CE + KL on reliable voxels; on all voxels 1 - cos(p, q) and the sums of Dice.
struct RectifiedConsistency {
  static constexpr int kMaps = 2, kStudents = 1;
  enum Scalar { kVoxels, kNumSelected, kRectified, kApart, kScalars };
  enum Row { kStudentSquare, kTeacherSquare, kProduct, kChosen, kRows };

  template <int kClassCapacity, class F, class Sums>
  VOXEL_FN void sums(const F (&z)[kMaps][kClassCapacity], F flags, int classes, Sums& to) const {
    const Prediction<kClassCapacity, F> student(z[0], classes), teacher(z[1], classes);
    const Agreement<kClassCapacity, F> agreement(student, teacher, classes);
    const F one = F{} + 1.f;
    const auto inside = flags >= 0.f, sure = flags >= float(kReliable);
    to.scalar(kVoxels, select(inside, one, F{}));
    to.scalar(kNumSelected, select(sure, one, F{}));
    const F rectified = select(sure, agreement.weight * agreement.ce + agreement.kl, F{});
    to.scalar(kRectified, select(flags == kOutOfRange, F{} + NAN, rectified));
    to.scalar(kApart, select(inside, 1.f - agreement.cosine, F{}));
    FOR_CLASSES(c, 1, kClassCapacity, classes) {
      const F p = student.p[c], q = teacher.p[c];
      to.row(kStudentSquare, c, select(inside, p * p, F{}));
      to.row(kTeacherSquare, c, select(inside, q * q, F{}));
      to.row(kProduct, c, select(inside, p * q, F{}));
      to.row(kChosen, c, select(inside & (teacher.label == float(c)), one, F{}));
    }
  }

  template <int kClassCapacity, class F, class G>
  VOXEL_FN void gradient(const F (&z)[kMaps][kClassCapacity], F flags, int classes, const G& g,
                         F (&to)[kStudents][kClassCapacity]) const {
    const Prediction<kClassCapacity, F> student(z[0], classes), teacher(z[1], classes);
    const Agreement<kClassCapacity, F> agreement(student, teacher, classes);
    const F one = F{} + 1.f;
    const auto inside = flags >= 0.f;
    const F rectified = select(flags >= float(kReliable), F{} + g.scalar(kRectified), F{});
    const F correct = rectified * agreement.weight, follow = rectified * (1.f - agreement.weight * agreement.ce);
    F along = {};  // sum p G, with G the gradient of the rows by p
    FOR_CLASSES(c, 1, kClassCapacity, classes) {
      to[0][c] = 2.f * g.row(kStudentSquare, c) * student.p[c] + g.row(kProduct, c) * teacher.p[c];
      along = along + student.p[c] * to[0][c];
    }
    FOR_CLASSES(c, 0, kClassCapacity, classes) {
      const F p = student.p[c], q = teacher.p[c], onehot = select(teacher.label == float(c), one, F{});
      const F direction = p * agreement.inverse_p;
      const F turn = direction * (agreement.cosine * direction - q * agreement.inverse_q);  // gradient of 1 - cos
      const F by_products = p * ((c > 0 ? to[0][c] : F{}) - along);
      const F from_pseudo_label = correct * (p - onehot) + follow * (p - q);
      to[0][c] = select(inside, from_pseudo_label + g.scalar(kApart) * turn + by_products, F{});
    }
  }
};

// |p - q|^2 of a student and a teacher, where the teacher's entropy is below a limit or NaN, so that NaN gives NaN.
struct MaskedConsistency {
  static constexpr int kMaps = 2, kStudents = 1;
  enum Scalar { kCertain, kSquares, kScalars };
  enum Row { kRows };

  float sharpness, max_entropy;  // 1 / temperature

  template <int kClassCapacity, class F>
  struct Pair {
    Prediction<kClassCapacity, F> student, teacher;

    VOXEL_FN Pair(const F (&z)[kMaps][kClassCapacity], float sharpness, int classes)
        : student(z[0], classes), teacher(sharpened(z[1], sharpness, classes)) {}

    VOXEL_FN static Prediction<kClassCapacity, F> sharpened(const F (&z)[kClassCapacity], float sharpness,
                                                            int classes) {
      F scaled[kClassCapacity];
      FOR_CLASSES(c, 0, kClassCapacity, classes) scaled[c] = sharpness * z[c];
      return {scaled, classes};
    }
  };

  // 1 where the voxel exists and the teacher is certain, else 0; a NaN entropy counts, so that the loss is NaN.
  template <int kClassCapacity, class F>
  VOXEL_FN F counts(const Pair<kClassCapacity, F>& of, F side, int classes) const {
    return select(of.teacher.entropy(classes) >= max_entropy, F{}, select(side >= 0.f, F{} + 1.f, F{}));
  }

  template <int kClassCapacity, class F, class Sums>
  VOXEL_FN void sums(const F (&z)[kMaps][kClassCapacity], F side, int classes, Sums& to) const {
    const Pair<kClassCapacity, F> of(z, sharpness, classes);
    const F certain = counts(of, side, classes);
    F square = {};
    FOR_CLASSES(c, 0, kClassCapacity, classes) {
      const F apart = of.student.p[c] - of.teacher.p[c];
      square = square + apart * apart;
    }
    to.scalar(kCertain, certain);
    to.scalar(kSquares, select(certain > 0.f, square, F{}));
  }

  template <int kClassCapacity, class F, class G>
  VOXEL_FN void gradient(const F (&z)[kMaps][kClassCapacity], F side, int classes, const G& g,
                         F (&to)[kStudents][kClassCapacity]) const {
    const Pair<kClassCapacity, F> of(z, sharpness, classes);
    const auto certain = counts(of, side, classes) > 0.f;
    const F scale = F{} + 2.f * g.scalar(kSquares);
    F along = {};
    FOR_CLASSES(c, 0, kClassCapacity, classes) along = along + of.student.p[c] * (of.student.p[c] - of.teacher.p[c]);
    FOR_CLASSES(c, 0, kClassCapacity, classes) {
      const F grad = scale * of.student.p[c] * (of.student.p[c] - of.teacher.p[c] - along);
      to[0][c] = select(certain, grad, F{});
    }
  }
};

}  // namespace sslfast
