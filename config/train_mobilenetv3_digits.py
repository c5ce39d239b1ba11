# The largest network of the small MobileNetV3 space on digits: where progressive shrinking starts
# (config/shrink_mobilenetv3_digits.py).
# python train.py config/train_mobilenetv3_digits.py
include('search_mobilenetv3_digits.py')
out_dir = 'out/train_mobilenetv3_digits'
depth = 3
kernel_size = 7
expand = 6
val_portion = 0.25 # not more than the search trains on
